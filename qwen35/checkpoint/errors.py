"""The one error of this package, and how long lists of tensor names are told in it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qwen35.errors import UserError

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class CheckpointError(UserError):
    """A checkpoint that is broken, half-written, or does not fit; the message is one line and names every culprit."""


@dataclass
class Misfit:
    """What keeps a checkpoint from fitting, collected so that it can be told at once."""

    missing: list[str] = field(default_factory=list)  # asked for, not there
    surplus: list[str] = field(default_factory=list)  # there, not asked for
    misshapen: dict[str, tuple[Sequence[int], Sequence[int]]] = field(
        default_factory=dict
    )  # name -> (there, asked for)
    other: list[str] = field(default_factory=list)

    def raise_if_any(self, headline: str) -> None:
        """Raise CheckpointError with everything in one line, if there is anything."""
        parts = []
        if self.missing:
            parts.append(f"{_count(self.missing)} missing: {fold(self.missing)}")
        if self.surplus:
            parts.append(f"{_count(self.surplus)} not of this model: {fold(self.surplus)}")
        if self.misshapen:
            shapes: dict[str, list[str]] = {}
            for name, (there, wanted) in self.misshapen.items():
                shapes.setdefault(f"{list(there)} instead of {list(wanted)}", []).append(name)
            told = ", ".join(f"{fold(names)} is {words}" for words, names in shapes.items())
            parts.append(f"{_count(list(self.misshapen))} misshapen: {told}")
        parts += self.other
        if parts:
            raise CheckpointError(f"{headline}: " + "; ".join(parts))


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def fold(names: Iterable[str]) -> str:
    """Names as one line; those that differ only in layer or expert are folded: `layers.{0-2,4}.mlp.gate.weight`.

    Nothing is left out: names are folded only where every combination of the numbers shown is present.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(NUMBER.sub("#", name), []).append(name)
    told = []
    for template, members in groups.items():
        columns = [sorted(set(column)) for column in zip(*(map(int, NUMBER.findall(m)) for m in members), strict=True)]
        combinations = 1
        for column in columns:
            combinations *= len(column)
        if len(members) > 1 and combinations == len(set(members)):
            first, *rest = template.split("#")
            told.append(first + "".join(_ranges(c) + text for c, text in zip(columns, rest, strict=True)))
        else:
            told += members
    return ", ".join(told)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 4] -> "{0-2,4}"; a single number stays itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
