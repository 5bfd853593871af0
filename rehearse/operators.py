"""The operators of a step by its phases: how many, what they move through memory, and what must not be among them."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen35.errors import UserError
from rehearse.cost import moved, workspace
from rehearse.memory import PHASES, Ledger
from rehearse.representatives import Cut, Moment
from rehearse.source_lines import place, place_of
from rehearse.watch import Record, note


class RehearsalError(UserError):
    """The step would not run on NPUs, or not well: a missing kernel, a host sync, too little memory."""


@dataclass
class Operators:
    """An Observer of a step on NPUs. `moment` is set by who knows it."""

    cut: Cut | None = None
    moment: Moment = field(default_factory=Moment)
    seen: dict[Moment, Record] = field(default_factory=lambda: defaultdict(Record))
    workspace: int = 0  # bytes: the most that an operator asked for, which torch_npu keeps for the next one
    locked: Ledger = field(init=False)  # memory of the host that the device writes to by itself

    def __post_init__(self) -> None:
        self.locked = Ledger("cpu", self.cut)

    def saw(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        record = self.seen[self.moment]
        if kwargs.get("pin_memory"):
            self.locked.saw(func, args, kwargs, [], outputs)
            return
        if func.name() == "aten::copy_" and len(args) > 2 and args[2] and args[0] in self.locked:
            record.copied += args[0].nbytes  # the host goes on
            return
        if not any(x.device.type == "npu" for x in (*inputs, *outputs)):
            return
        before = len(record.wrong)
        note(record, func, args, kwargs, inputs, outputs)
        record.wrong[before:] = [f"{what} in {self.moment.phase} ({place()})" for what in record.wrong[before:]]
        record.moved += moved(func, args, kwargs, outputs)
        self.workspace = max(self.workspace, workspace(func, args, kwargs, outputs))

    @property
    def records(self) -> dict[str, Record]:
        """Of each phase of the whole step."""
        found = {phase: Record() for phase in PHASES}
        for moment, record in self.seen.items():
            found[moment.phase].add(record, self.cut.times(moment) if self.cut else 1)
        return found

    def check(self) -> None:
        """Raises UnevenError."""
        if self.cut:
            self.cut.check(self.seen)

    @property
    def most_locked(self) -> int:
        return max(peak.bytes for peak in self.locked.peaks().values())

    @property
    def wrong(self) -> list[str]:
        records = self.records
        return [what for phase in PHASES[1:] for what in records[phase].wrong]


def refused(error: BaseException) -> RehearsalError | None:
    """What torch's fake tensors raise where the host would have to know a value, or nobody knows a shape."""
    fake = torch._subclasses.fake_tensor
    func: Any = getattr(error, "func", None)
    name = func.name() if hasattr(func, "name") else str(func)
    if isinstance(error, fake.DataDependentOutputException | fake.DynamicOutputShapeException):
        return RehearsalError(f"{name} waits for the device ({place_of(error)})")
    if isinstance(error, fake.UnsupportedOperatorException):
        return RehearsalError(f"{name} has no kernel for the device ({place_of(error)})")
    return None
