"""A rehearsal runs a few layers and micro-batches as representatives of many that are alike.

Of blocks that are alike, four are run: the first, two from the middle, and the last, which differs
because nothing follows it. The second represents all middle blocks but one, which is the third:
everything observed about these two is compared, to prove that they are alike. A block of text
layers is one period of layer_types (as published, three gated delta nets and an attention), a block
of the vision tower is one layer. Of micro-batches three are run, and the last two are compared.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from torch import nn

from qwen35.model import ModelConfig, Qwen35

T = TypeVar("T")
TEXT, VISION, MICRO_BATCH = "text", "vision", ""
PREFIXES = {TEXT: "model.language_model.layers.", VISION: "model.visual.blocks."}
COMPARED = (1, 2)  # the representatives that must be alike


class Moment(NamedTuple):
    """Where in a step an operator runs."""

    phase: str = "set-up"
    micro_batch: int = 0
    kind: str = ""  # of the block that is running: TEXT, VISION, or "" outside of both
    block: int = 0

    def __str__(self) -> str:
        where = f", {self.kind} block {self.block}" if self.kind else ""
        return f"{self.phase} of micro-batch {self.micro_batch}{where}"


class NotAlikeError(Exception):
    """Blocks or micro-batches that should be alike are not: all of them have to be rehearsed."""


def assign(count: int, representatives: int) -> list[int]:
    """For each of `count` items the index of its representative: 0, 1 for the middle, 2, …"""
    middle = count - representatives + 1
    return list(range(count)) if middle < 2 else [0] + [1] * middle + list(range(2, representatives))


@dataclass(frozen=True)
class Representatives:
    config: ModelConfig  # of the model that is run, with fewer layers
    period: int  # text layers in a block
    assigned: dict[str, list[int]]  # kind of block, or MICRO_BATCH -> what `assign` returns

    @classmethod
    def of(cls, config: ModelConfig, micro_batches: int, is_whole: bool) -> "Representatives":
        kinds, vision = config.text.layer_types, config.vision
        period = next(
            n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n)
        )
        counts = {TEXT: len(kinds) // period, MICRO_BATCH: micro_batches} | ({VISION: vision.depth} if vision else {})
        assigned = {
            kind: assign(count, count if is_whole else 3 if kind == MICRO_BATCH else 4)
            for kind, count in counts.items()
        }
        run_counts = {kind: len(set(indices)) for kind, indices in assigned.items()}
        text = replace(config.text, layer_types=kinds[: period * run_counts[TEXT]])
        tower = vision and replace(vision, depth=run_counts[VISION])
        return cls(replace(config, text=text, vision=tower), period, assigned)

    def count(self, kind: str) -> int:
        """How many representatives of a kind are run."""
        return self.assigned[kind][-1] + 1

    def is_reduced(self, kind: str) -> bool:
        return self.count(kind) < len(self.assigned[kind])

    def multiplicity(self, moment: Moment) -> int:
        """How often the moment occurs in the whole step."""
        return self.assigned[MICRO_BATCH].count(moment.micro_batch) * self.blocks_like(moment)

    def blocks_like(self, moment: Moment) -> int:
        """How many blocks of the whole model its block represents."""
        return self.assigned[moment.kind].count(moment.block) if moment.kind else 1

    def layer(self, index: int) -> int:
        """The text layer that represents layer `index` of the whole model."""
        return self.assigned[TEXT][index // self.period] * self.period + index % self.period

    def parameter(self, name: str) -> str:
        """The parameter that represents parameter `name` of the whole model."""
        for kind, prefix in PREFIXES.items():
            if match := re.match(rf"{re.escape(prefix)}(\d+)", name):
                index = self.layer(int(match[1])) if kind == TEXT else self.assigned[VISION][int(match[1])]
                return f"{prefix}{index}{name[match.end() :]}"
        return name

    def expand(self, events: Sequence[tuple[Moment, T]]) -> Iterator[T]:
        """The events of the whole step in order, from those of the representatives in order."""
        for micro_batch, of_batch in groupby(events, lambda event: event[0].micro_batch):
            batch_events: list[T] = []
            for moment, of_moment in groupby(of_batch, lambda event: event[0]):
                batch_events += [event for _, event in of_moment] * self.blocks_like(moment)
            for _ in range(self.assigned[MICRO_BATCH].count(micro_batch)):
                yield from batch_events

    def check(self, seen: Mapping[Moment, Any]) -> None:
        """Compare what was seen at the moments that must be alike. Raises NotAlikeError."""
        first, second = COMPARED
        for moment in seen:
            if moment.kind and self.is_reduced(moment.kind) and moment.block in COMPARED:
                _compare(seen, moment._replace(block=first), moment._replace(block=second))
            is_of_batch = moment.micro_batch in COMPARED and moment.phase != "optimizer"
            if self.is_reduced(MICRO_BATCH) and is_of_batch:
                _compare(seen, moment._replace(micro_batch=first), moment._replace(micro_batch=second))


def _compare(seen: Mapping[Moment, Any], one: Moment, other: Moment) -> None:
    if seen.get(one) != seen.get(other):
        raise NotAlikeError(f"{one} is not like {other}")


class RepresentativeModel(Qwen35):
    """Names parameters as the whole model does; one that represents several is listed as each."""

    representatives: Representatives | None = None
    names: Sequence[str] = ()  # of the whole model's parameters

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        parameters = super().named_parameters(*args, **kwargs)
        if self.representatives is None:
            return parameters
        by_name = dict(parameters)
        return ((name, by_name[self.representatives.parameter(name)]) for name in self.names)
