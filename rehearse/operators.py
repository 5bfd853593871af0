"""The operators of a step by phase: their number, the bytes they move, and those not allowed."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qwen35.errors import UserError
from rehearse.cost import bytes_moved, launches, workspace
from rehearse.limits import problems
from rehearse.memory import PHASES, Ledger
from rehearse.representatives import Moment, Representatives
from rehearse.source_lines import calling_line, raising_line

SYNCS = {  # the host waits for the device in these, whatever the values
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim"),
    *("aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::equal", "aten::is_nonzero"),
    "aten::bincount",
}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::copy"}  # the operators in which two devices may meet
KEYS = (
    *("PrivateUse1", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"),
    "CompositeImplicitAutograd",
)


class RehearsalError(UserError):
    """The step would not run well on NPUs: a missing kernel, a host sync, too little memory."""


@dataclass
class OperatorCounts:
    ops: Counter = field(default_factory=Counter)
    launched: int = 0  # kernels: none for a view, several for a list of tensors
    dispatched: int = 0  # units of host work: at least one an operator, views included
    moved: Counter = field(default_factory=Counter)  # (operator, line) -> bytes through the device's memory
    bytes_copied: int = 0  # to pinned host memory
    syncs: int = 0  # the allowed ones, which read the token counts of the experts
    wrong: list[str] = field(default_factory=list)

    @property
    def bytes_moved(self) -> int:
        """Without those of matmuls."""
        return self.moved.total()

    def add(self, other: "OperatorCounts", times: int) -> None:
        for mine, others in (self.ops, other.ops), (self.moved, other.moved):
            for name, count in others.items():
                mine[name] += count * times
        for counter in ("launched", "dispatched", "bytes_copied", "syncs"):
            setattr(self, counter, getattr(self, counter) + getattr(other, counter) * times)
        self.wrong += other.wrong * times


def count_operator(
    counts: OperatorCounts,
    func: torch._ops.OpOverload,
    args: tuple,
    kwargs: dict,
    inputs: list[Tensor],
    outputs: list[Tensor],
) -> None:
    """Count an operator on NPU tensors, and note what the device refuses or the host waits for."""
    name = func.name()
    counts.ops[name] += 1
    started = launches(func, args)
    counts.launched += started
    counts.dispatched += max(1, started)
    foreign = {x.device.type for x in inputs if x.device.type != "npu" and x.ndim}
    if name in SYNCS:
        counts.wrong.append(f"{name} waits for the device")
    if name in COPIES:
        source = args[1] if name != "aten::_to_copy" else args[0]
        target = outputs[0].device.type
        if source.device.type == "npu" and target != "npu":
            counts.wrong.append(f"{name} copies {list(source.shape)} to the host")
        if source.device.type != "npu" and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            counts.wrong.append(f"{name} copies {list(source.shape)} from the host, which waits for it")
    elif foreign or any(x.device.type != "npu" for x in outputs):
        counts.wrong.append(f"{name} mixes npu with {foreign or 'what it returns'}")
    if name == "aten::index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1]):
        counts.wrong.append("aten::index.Tensor with a mask waits for the device")
    counts.wrong += problems(func, args, kwargs)
    if func.namespace in ("aten", "npu") and not has_kernel(func):
        counts.wrong.append(f"{name} has no kernel for the device")


@cache
def has_kernel(func: torch._ops.OpOverload) -> bool:
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in KEYS)


@dataclass
class Operators:
    """An Observer of a step on NPUs. PhaseTracker sets `moment`."""

    representatives: Representatives | None = None
    moment: Moment = field(default_factory=Moment)
    seen: dict[Moment, OperatorCounts] = field(default_factory=lambda: defaultdict(OperatorCounts))
    workspace: int = 0  # bytes: the largest that an operator asked for, which torch_npu keeps for the next
    pinned: Ledger = field(init=False)  # host memory that the device reads and writes by itself

    def __post_init__(self) -> None:
        self.pinned = Ledger("cpu", self.representatives)

    def observe(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        counts = self.seen[self.moment]
        if kwargs.get("pin_memory"):
            self.pinned.observe(func, args, kwargs, [], outputs)
            return
        if func.name() == "aten::copy_" and len(args) > 2 and args[2] and args[0] in self.pinned:
            counts.bytes_copied += args[0].nbytes  # the host does not wait
            return
        if not any(x.device.type == "npu" for x in (*inputs, *outputs)):
            return
        before = len(counts.wrong)
        count_operator(counts, func, args, kwargs, inputs, outputs)
        counts.wrong[before:] = [f"{what} in {self.moment.phase} ({calling_line()})" for what in counts.wrong[before:]]
        if moved := bytes_moved(func, args, kwargs, outputs):
            counts.moved[func.name(), calling_line()] += moved
        self.workspace = max(self.workspace, workspace(func, args, kwargs, outputs))

    @property
    def by_phase(self) -> dict[str, OperatorCounts]:
        """Of the whole step."""
        found = {phase: OperatorCounts() for phase in PHASES}
        for moment, counts in self.seen.items():
            times = self.representatives.multiplicity(moment) if self.representatives else 1
            found[moment.phase].add(counts, times)
        return found

    def check(self) -> None:
        """Raises NotAlikeError."""
        if self.representatives:
            self.representatives.check(self.seen)

    @property
    def peak_pinned(self) -> int:
        return max(peak.bytes for peak in self.pinned.peaks().values())

    @property
    def wrong(self) -> list[str]:
        by_phase = self.by_phase
        return [what for phase in PHASES[1:] for what in by_phase[phase].wrong]


def as_rehearsal_error(error: BaseException) -> RehearsalError | None:
    """For fake tensors' errors: a value of the device is read, or an operator has no kernel."""
    fake = torch._subclasses.fake_tensor
    func: Any = getattr(error, "func", None)
    name = func.name() if hasattr(func, "name") else str(func)
    if isinstance(error, fake.DataDependentOutputException | fake.DynamicOutputShapeException):
        return RehearsalError(f"{name} waits for the device ({raising_line(error)})")
    if isinstance(error, fake.UnsupportedOperatorException):
        return RehearsalError(f"{name} has no kernel for the device ({raising_line(error)})")
    return None
