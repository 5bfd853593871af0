"""Bytes of the storages that are alive on a device, from their making to their release."""

from itertools import accumulate

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rehearse.memory import Ledger

BEFORE = "before"


class LiveBytes(TorchDispatchMode):
    """Counts bytes of fake or real tensors made since its start: `now`, and the highest, `peak`.

    What an operator takes for itself inside is not seen.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self._ledger = Ledger(device_type)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = tensors((args, kwargs))
        self._ledger.claim(BEFORE, [x for x in inputs if x.untyped_storage()._cdata not in self._ledger.live])
        out = func(*args, **(kwargs or {}))
        self._ledger.observe(func, args, kwargs or {}, inputs, tensors(out))
        return out

    @property
    def now(self) -> int:
        return sum(self._changes())

    @property
    def peak(self) -> int:
        return max(accumulate(self._changes()), default=0)

    def _changes(self) -> list[int]:
        return [change for number, change, _ in self._ledger.changes if self._ledger.kind(number) != BEFORE]


def tensors(values) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
