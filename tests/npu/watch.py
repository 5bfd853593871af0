"""Dispatch modes of the ladder's tests: operators on fake NPU tensors, and what autograd saves."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rehearse.cluster import tensors_among
from rehearse.operators import OperatorCounts, count_operator


class Watch(TorchDispatchMode):
    """Counts operators on NPU tensors; notes host syncs, other devices and missing kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.record = OperatorCounts()
        self.calls: list[tuple[torch._ops.OpOverload, tuple, dict]] = []  # torch_npu's own

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        leaves, made = tensors_among((*args, *kwargs.values())), tensors_among((out,))
        if func.namespace != "prim" and any(
            x.device.type == "npu" for x in (*leaves, *made)
        ):  # prim: internal to fake tensors
            count_operator(self.record, func, args, kwargs, leaves, made)
            if func.namespace == "npu":
                self.calls.append((func, args, kwargs))
        return out


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that autograd saves for backward, without those of `parameters`."""

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
