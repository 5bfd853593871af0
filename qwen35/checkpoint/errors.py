"""CheckpointError, and how long lists of tensor names are shortened in its message."""

import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qwen35.errors import LISTS_FOLDER, UserError, one_line, visible
from qwen35.wording import ranges

MAX_NAMES = 3  # tensors of one kind that a message names
MAX_MESSAGE = 500  # characters
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete or does not fit; the message is one line."""


@dataclass
class Mismatch:
    """How stored tensors differ from what a model expects, collected to be reported in one error.

    The message counts the tensors of each fault and names the first few; a file that it names lists
    them all.
    """

    faults: dict[str, list[str]] = field(default_factory=dict)  # fault -> names of tensors
    hints: list[str] = field(default_factory=list)  # printed before the tensors

    @staticmethod
    def between(stored: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> "Mismatch":
        """How names and shapes differ."""
        mismatch = Mismatch({"missing": [n for n in wanted if n not in stored]})
        mismatch.add("not of this model", *(n for n in stored if n not in wanted))
        for name, shape in wanted.items():
            mismatch.compare(name, stored.get(name, shape), shape)
        return mismatch

    def add(self, fault: str, *names: str) -> None:
        self.faults.setdefault(fault, []).extend(names)

    def compare(self, name: str, stored: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(stored) != tuple(wanted):
            self.add("misshapen", f"{name} is {list(stored)} instead of {list(wanted)}")

    def raise_if_any(self, headline: str) -> None:
        """Raise CheckpointError with everything in one line, if there is anything."""
        parts, names_all = list(self.hints), True
        for fault, names in self.faults.items():
            if folded := fold_names(names):
                rest = ", …" * (len(folded) > MAX_NAMES)
                parts.append(
                    f"{len(names)} tensor{'s' * (len(names) != 1)} {fault}: {', '.join(folded[:MAX_NAMES])}{rest}"
                )
                names_all &= not rest
        message = visible(f"{headline}: {'; '.join(parts)}")
        if parts and (not names_all or len(message) > MAX_MESSAGE):
            lines = [headline, *(f"{fault}: {name}" for fault, names in self.faults.items() for name in names)]
            where = f"; all of them: {_write_list(lines)}"
            room = MAX_MESSAGE - len(where)
            message = (message if len(message) <= room else f"{message[: room - 1]}…") + where
        if parts:
            raise CheckpointError(message)


def abbreviate(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(visible(name[:80]) for name in names[:MAX_NAMES])
    return shown + f" and {len(names) - MAX_NAMES} more" * (len(names) > MAX_NAMES)


def _write_list(lines: list[str]) -> str:
    """Write lines into a temporary file that only its owner can read. Returns its name."""
    try:
        handle, path = tempfile.mkstemp(".txt", "qwen35-", os.environ.get(LISTS_FOLDER))
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{visible(line)}\n" for line in lines)
    except OSError as error:
        return f"nowhere, for no file can be written ({one_line(error)})"
    return path


def fold_names(names: Iterable[str]) -> list[str]:
    """Fold names into one, `layers.{0-2,4}.mlp.gate.weight`, if all combinations are present."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(NUMBER.sub("#", name), []).append(name)
    folded = []
    for template, members in groups.items():
        columns = [sorted(set(column)) for column in zip(*(map(int, NUMBER.findall(m)) for m in members), strict=True)]
        if len(members) > 1 and math.prod(map(len, columns)) == len(set(members)):
            first, *rest = template.split("#")
            folded.append(first + "".join(_folded(c) + text for c, text in zip(columns, rest, strict=True)))
        else:
            folded += members
    return folded


def _folded(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 4] -> "{0-2,4}", but [7] -> "7"."""
    return str(numbers[0]) if len(numbers) == 1 else f"{{{','.join(ranges(numbers, '-'))}}}"
