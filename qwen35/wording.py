"""Counts in messages, with the noun in the singular or the plural."""

from collections.abc import Iterable
from datetime import timedelta


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
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    names = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in ranges)
    return f"{what}{'s' * (sum(map(len, ranges)) > 1)} {names}"
