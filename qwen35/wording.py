"""Counts in messages, with the noun in the singular or the plural."""

from collections.abc import Iterable
from datetime import timedelta
from itertools import groupby


def number_of(number: int, what: str) -> str:
    """`1 record`, `1,200 records`, `2 micro-batches`."""
    ending = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{ending}"


def number_of_visuals(images: int, videos: int) -> str:
    """`2 images`, `1 image, 3 videos`."""
    return number_of(images, "image") + f", {number_of(videos, 'video')}" * (videos > 0)


def duration(seconds: float) -> str:
    """`0:01:12`, `2 days, 3:04:05`."""
    return str(timedelta(seconds=round(seconds)))


def named(what: str, numbers: Iterable[int]) -> str:
    """`node 1`, `nodes 1 to 3, 5`."""
    found = sorted(numbers)
    return f"{what}{'s' * (len(found) > 1)} {', '.join(ranges(found, ' to '))}"


def ranges(numbers: Iterable[int], to: str) -> list[str]:
    """Of numbers that rise: [1, 2, 3, 5] -> `1 to 3` and `5`."""
    runs = ([n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]))
    return [str(run[0]) if len(run) == 1 else f"{run[0]}{to}{run[-1]}" for run in runs]
