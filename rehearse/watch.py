"""What a step does on a device that is not there: every operator that is dispatched, and what must not be among them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rehearse.cost import launches
from rehearse.limits import problems

# the host waits for the device in these, whatever the values
SYNCS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
    "aten::equal",
    "aten::is_nonzero",
    "aten::bincount",
}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::copy"}  # the operators in which two devices may meet
KEYS = (
    "PrivateUse1",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)


@dataclass
class Record:
    ops: Counter = field(default_factory=Counter)
    launched: int = 0  # kernels: none for a view, several for a list
    host: int = 0  # what the host does one after the other: views too
    moved: int = 0  # bytes through the device's memory, matmuls' left out
    copied: int = 0  # bytes to page-locked memory of the host
    syncs: int = 0  # the allowed ones: each asks for counts of rows by expert
    wrong: list[str] = field(default_factory=list)

    def add(self, other: "Record", times: int) -> None:
        for name, count in other.ops.items():
            self.ops[name] += count * times
        for counter in ("launched", "host", "moved", "copied", "syncs"):
            setattr(self, counter, getattr(self, counter) + getattr(other, counter) * times)
        self.wrong += other.wrong * times


class Watch(TorchDispatchMode):
    """Counts the operators on NPU tensors, and notes host syncs, foreign devices and operators without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self.calls: list[tuple[torch._ops.OpOverload, tuple, dict]] = []  # torch_npu's own

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.namespace != "prim" and any(
            x.device.type == "npu" for x in (*leaves, *made)
        ):  # prim: fake tensors' own
            note(self.record, func, args, kwargs, leaves, made)
            if func.namespace == "npu":
                self.calls.append((func, args, kwargs))
        return out


def note(
    record: Record, func: torch._ops.OpOverload, args: tuple, kwargs: dict, leaves: list[Tensor], made: list[Tensor]
) -> None:
    """Count an operator on NPU tensors: `leaves` are all tensors of its arguments, `made` those that it returned."""
    name = func.name()
    record.ops[name] += 1
    started = launches(func, args)
    record.launched += started
    record.host += max(1, started)
    foreign = {x.device.type for x in leaves if x.device.type != "npu" and x.ndim}
    if name in SYNCS:
        record.wrong.append(f"{name} waits for the device")
    if name in COPIES:
        source = args[1] if name != "aten::_to_copy" else args[0]
        to = made[0].device.type
        if source.device.type == "npu" and to != "npu":
            record.wrong.append(f"{name} copies {list(source.shape)} to the host")
        if source.device.type != "npu" and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            record.wrong.append(f"{name} copies {list(source.shape)} from the host, which waits for it")
    elif foreign or any(x.device.type != "npu" for x in made):
        record.wrong.append(f"{name} mixes npu with {foreign or 'what it returns'}")
    if name == "aten::index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1]):
        record.wrong.append("aten::index.Tensor with a mask waits for the device")
    record.wrong += problems(func, args, kwargs)
    if func.namespace in ("aten", "npu") and not has_kernel(func):
        record.wrong.append(f"{name} has no kernel for the device")


@cache
def has_kernel(func: torch._ops.OpOverload) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(func.name(), key) for key in KEYS)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that autograd keeps for backward, each once, without those of `parameters`."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.known = {id(_storage(p)): _storage(p) for p in parameters}
        self.skip = set(self.known)
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = _storage(x)
        self.known[id(storage)] = storage
        return x

    @property
    def total(self) -> int:
        return sum(s.nbytes() for i, s in self.known.items() if i not in self.skip)


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()
