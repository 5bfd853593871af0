"""The operators of a step by its phases: how many, what they move through memory, and what must not be among them."""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen35.errors import UserError
from rehearse.cost import moved, workspace
from rehearse.memory import PHASES
from rehearse.places import place, place_of
from rehearse.watch import Record, note


class RehearsalError(UserError):
    """The step would not run on NPUs, or not well: a missing kernel, a host sync, too little memory."""


class PageLocked:
    """Memory of the host that the device writes to by itself."""

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, weakref.ref]] = {}  # by the address of the storage
        self.now = self.most = 0  # bytes

    def add(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            address, size = storage._cdata, storage.nbytes()
            if address not in self.sizes:
                self.sizes[address] = size, weakref.ref(storage, partial(self._drop, address))
                self.now += size
                self.most = max(self.most, self.now)

    def _drop(self, address: int, _: object) -> None:
        self.now -= self.sizes.pop(address)[0]

    def __contains__(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.sizes


@dataclass
class Operators:
    """An Observer of a step on NPUs. `phase` is set by who knows it."""

    phase: str = PHASES[0]
    records: dict[str, Record] = field(default_factory=lambda: {phase: Record() for phase in PHASES})
    moved: Counter[str] = field(
        default_factory=Counter
    )  # phase -> bytes through the device's memory, matmuls' left out
    copied: Counter[str] = field(default_factory=Counter)  # phase -> bytes to page-locked memory of the host
    syncs: Counter[str] = field(
        default_factory=Counter
    )  # phase -> the allowed ones: each asks for counts of rows by expert

    workspace: int = 0  # bytes: the most that an operator asked for, which torch_npu keeps for the next one
    locked: PageLocked = field(default_factory=PageLocked)

    def saw(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if kwargs.get("pin_memory"):
            self.locked.add(outputs)
            return
        if func.name() == "aten::copy_" and len(args) > 2 and args[2] and args[0] in self.locked:
            self.copied[self.phase] += args[0].nbytes  # the host goes on
            return
        if not any(x.device.type == "npu" for x in (*inputs, *outputs)):
            return
        record = self.records[self.phase]
        before = len(record.wrong)
        note(record, func, args, kwargs, inputs, outputs)
        record.wrong[before:] = [f"{what} in {self.phase} ({place()})" for what in record.wrong[before:]]
        self.moved[self.phase] += moved(func, args, kwargs, outputs)
        self.workspace = max(self.workspace, workspace(func, args, kwargs, outputs))

    @property
    def wrong(self) -> list[str]:
        return [what for phase in PHASES[1:] for what in self.records[phase].wrong]


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
