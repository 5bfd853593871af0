"""The operators of a step by its phases: how many, what they move through memory, and what must not be among them."""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen35.errors import UserError
from rehearse.memory import PHASES
from rehearse.places import place, place_of
from rehearse.watch import Record, note
from rehearse.wire import size_of

# bound by arithmetic, which the model's FLOPs stand for
MATMULS = (
    *("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "npu_grouped_matmul", "npu_fusion_attention"),
    *("npu_fusion_attention_grad", "invert", "scan", "states", "grad_states", "gradients"),
)
# read what they return, not all of what they are given
GATHERS = ("embedding", "index", "index_select", "gather", "npu_moe_token_permute")


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

    locked: PageLocked = field(default_factory=PageLocked)

    def saw(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if kwargs.get("pin_memory"):
            self.locked.add(outputs)
            return
        if func.name() == "aten::copy_" and len(args) > 2 and args[2] and args[0] in self.locked:
            self.copied[self.phase] += size_of(args[0])  # the host goes on
            return
        if not any(x.device.type == "npu" for x in (*inputs, *outputs)):
            return
        record = self.records[self.phase]
        before = len(record.wrong)
        note(record, func, args, kwargs, inputs, outputs)
        record.wrong[before:] = [f"{what} in {self.phase} ({place()})" for what in record.wrong[before:]]
        self.moved[self.phase] += _moved(func, inputs, outputs)

    @property
    def wrong(self) -> list[str]:
        return [what for phase in PHASES[1:] for what in self.records[phase].wrong]


def _moved(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    name = func._schema.name.partition("::")[2]
    if func.is_view or name in MATMULS or func.namespace in ("c10d", "_c10d_functional"):
        return 0
    if name in GATHERS:
        return 2 * sum(size_of(x) for x in outputs)
    return sum(size_of(x) for x in {id(x): x for x in (*inputs, *outputs)}.values())


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
