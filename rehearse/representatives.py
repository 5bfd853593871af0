"""Fewer layers and micro-batches in the place of many that are alike, and for how many each of them stands.

Of many that are alike a few are rehearsed: the first, two of the middle, and the last, which its neighbours make another. The
second stands for all of the middle but one, and the third proves that it may: all that was seen of the two is compared. Text
layers are alike by periods of layer_types, as published three delta nets and an attention; blocks of the vision tower and
micro-batches one by one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from torch import nn

from qwen35.model import ModelConfig, Qwen35

T = TypeVar("T")
TEXT, VISION = "text", "vision"
PREFIXES = {TEXT: "model.language_model.layers.", VISION: "model.visual.blocks."}
ALIKE = (1, 2)  # those of the middle that are rehearsed


class Moment(NamedTuple):
    """Of a step."""

    phase: str = "set-up"
    batch: int = 0  # the micro-batch
    kind: str = ""  # of the layers that are at work: text, vision; anything else is ""
    part: int = 0  # which of them


class UnevenError(Exception):
    """What should be alike is not: the whole has to be rehearsed."""


def shortened(count: int, kept: int) -> list[int]:
    """Of each of the whole, which of the kept stands for it."""
    return list(range(count)) if count <= kept else [0] + [1] * (count - kept + 1) + list(range(2, kept))


@dataclass(frozen=True)
class Cut:
    config: ModelConfig  # with fewer layers
    period: int  # text layers in a part
    stands_for: dict[str, list[int]]  # kind of part, "" micro-batches -> as `shortened`

    @classmethod
    def of(cls, config: ModelConfig, batches: int, is_whole: bool) -> "Cut":
        kinds, depth = config.text.layer_types, config.vision.depth
        period = next(
            n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n)
        )
        counts = {TEXT: len(kinds) // period, VISION: depth, "": batches}
        parts = {name: shortened(count, count if is_whole else 4 if name else 3) for name, count in counts.items()}
        text = replace(config.text, layer_types=kinds[: period * len(set(parts[TEXT]))])
        return cls(
            replace(config, text=text, vision=replace(config.vision, depth=len(set(parts[VISION])))), period, parts
        )

    def kept(self, kind: str) -> int:
        return self.stands_for[kind][-1] + 1

    def is_cut(self, kind: str) -> bool:
        return self.kept(kind) < len(self.stands_for[kind])

    def times(self, moment: Moment) -> int:
        """How often it is in the whole step."""
        return self._count("", moment.batch) * self.parts_like(moment)

    def parts_like(self, moment: Moment) -> int:
        return self._count(moment.kind, moment.part) if moment.kind else 1

    def _count(self, kind: str, part: int) -> int:
        return self.stands_for[kind].count(part)

    def layer(self, kind: str, index: int) -> int:
        """Of a layer of the whole model, which stands for it."""
        size = self.period if kind == TEXT else 1
        return self.stands_for[kind][index // size] * size + index % size

    def name(self, name: str) -> str:
        """Of a parameter of the whole model, that which stands for it."""
        for kind, prefix in PREFIXES.items():
            if found := re.match(rf"{re.escape(prefix)}(\d+)", name):
                return f"{prefix}{self.layer(kind, int(found[1]))}{name[found.end() :]}"
        return name

    def played(self, seen: Sequence[tuple[Moment, T]]) -> Iterator[T]:
        """What came one after the other, as it comes in the whole step."""
        for batch, of_batch in groupby(seen, lambda one: one[0].batch):
            whole: list[T] = []
            for moment, of_moment in groupby(of_batch, lambda one: one[0]):
                whole += [what for _, what in of_moment] * self.parts_like(moment)
            for _ in range(self._count("", batch)):
                yield from whole

    def check(self, seen: Mapping[Moment, Any]) -> None:
        """Of what was seen at each moment, two of the middle have to be alike. Raises UnevenError."""
        one, other = ALIKE
        for moment in seen:
            if moment.kind and self.is_cut(moment.kind) and moment.part in ALIKE:
                _compare(seen, moment._replace(part=one), moment._replace(part=other))
            if self.is_cut("") and moment.batch in ALIKE and moment.phase != "optimizer":
                _compare(seen, moment._replace(batch=one), moment._replace(batch=other))


def _compare(seen: Mapping[Moment, Any], one: Moment, other: Moment) -> None:
    if seen.get(one) != seen.get(other):
        raise UnevenError(f"{one} and {other} are not alike")


class CutModel(Qwen35):
    """Names parameters as the whole model does, each of a layer that stands for several as often as that."""

    cut: Cut | None = None
    names: Sequence[str] = ()  # of the whole model's parameters

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        found = super().named_parameters(*args, **kwargs)
        if self.cut is None:
            return found
        here = dict(found)
        return ((name, here[self.cut.name(name)]) for name in self.names)
