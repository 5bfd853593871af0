"""The one error of this package, and how long lists of tensor names are told in it."""

import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qwen35.errors import UserError, one_line, visible

MAX_NAMES = 3  # names of a kind in a message
MAX_MESSAGE = 500  # characters of a message
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class CheckpointError(UserError):
    """A checkpoint that is broken, half-written, or does not fit; the message is one line that names what is wrong with it."""


@dataclass
class Mismatch:
    """What keeps a checkpoint from fitting, collected so that it can be told at once.

    A message names the first few tensors of each kind and counts the rest; all of them stand in a file that it names.
    """

    missing: list[str] = field(default_factory=list)  # asked for, not there
    surplus: list[str] = field(default_factory=list)  # there, not asked for
    misshapen: dict[str, tuple[Sequence[int], Sequence[int]]] = field(
        default_factory=dict
    )  # name -> (there, asked for)
    faulty: dict[str, list[str]] = field(default_factory=dict)  # what else is wrong -> with which tensors
    other: list[str] = field(default_factory=list)  # what else is to be said, first of all

    def raise_if_any(self, headline: str) -> None:
        """Raise CheckpointError with everything in one line, if there is anything."""
        kinds = {"missing": fold_names(self.missing), "not of this model": fold_names(self.surplus)}
        shapes: dict[str, list[str]] = {}
        for name, (there, wanted) in self.misshapen.items():
            shapes.setdefault(f"is {list(there)} instead of {list(wanted)}", []).append(name)
        kinds["misshapen"] = [f"{one} {words}" for words, names in shapes.items() for one in fold_names(names)]
        kinds |= {words: fold_names(names) for words, names in self.faulty.items()}
        counts = {
            "missing": self.missing,
            "not of this model": self.surplus,
            "misshapen": self.misshapen,
            **self.faulty,
        }
        parts, is_whole = list(self.other), True
        for words, told in kinds.items():
            if told:
                count = len(counts[words])
                rest = ", …" * (len(told) > MAX_NAMES)
                parts.append(f"{count} tensor{'s' * (count != 1)} {words}: {', '.join(told[:MAX_NAMES])}{rest}")
                is_whole &= not rest
        message = visible(f"{headline}: {'; '.join(parts)}")
        if parts and (not is_whole or len(message) > MAX_MESSAGE):
            where = f"; all of them: {_write(headline, counts)}"
            room = MAX_MESSAGE - len(where)
            message = (message if len(message) <= room else f"{message[: room - 1]}…") + where
        if parts:
            raise CheckpointError(message)


def abbreviate(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(visible(name[:80]) for name in names[:MAX_NAMES])
    return shown + f" and {len(names) - MAX_NAMES} more" * (len(names) > MAX_NAMES)


def _write(headline: str, kinds: Mapping[str, Collection[str]]) -> str:
    """A new file that its owner alone can read, with a line for each tensor. Returns its path."""
    lines = [headline, *(f"{words}: {visible(name)}" for words, names in kinds.items() for name in names)]
    try:
        with tempfile.NamedTemporaryFile("w", prefix="qwen35-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        return f"nowhere, for no file can be written ({one_line(error)})"
    return file.name


def fold_names(names: Iterable[str]) -> list[str]:
    """Names that differ only in layer or expert are one: `layers.{0-2,4}.mlp.gate.weight`.

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
    return told


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
