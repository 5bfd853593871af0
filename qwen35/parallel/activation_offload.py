"""What layers keep for backward, in the host's memory meanwhile: it goes there while the next layer computes, and comes back
while the layer behind it is run backward. The last layer's stays: it is needed at once."""

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen35.device import CopyQueue

SMALLEST = 1 << 20  # bytes: less is not worth a copy


@dataclass
class Item:
    """One storage, as a flat tensor, in one place or both."""

    here: Tensor | None = None  # on the device
    there: Tensor | None = None


@dataclass(frozen=True)
class View:
    """What was kept: a view of an item."""

    item: Item
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any


class Offload:
    """Of a device: the two queues of copies, which serve one forward and backward after the other."""

    def __init__(self, device: torch.device, smallest: int = SMALLEST):
        self.device, self.smallest = device, smallest
        self.going, self.coming = CopyQueue(device), CopyQueue(device)

    def stash(self, layer: nn.Module, shared: Iterable[Tensor], before: "Stash | None", is_last: bool) -> "Stash":
        """Of a layer's forward. `shared`: what all layers use, which stays where it is; before: the stash of the one before."""
        return Stash(self, layer, {_key(x) for x in shared}, before, is_last)


class Stash:
    """As a context around a layer's forward: what autograd keeps inside, each storage once, without parameters.

    pack and unpack serve what is kept in other ways too. FSDP's whole weights are parameters while a layer runs, and FSDP's to
    free. A stash lives as long as something that was packed; it holds the one before it, and never the one after.
    """

    def __init__(self, offload: Offload, layer: nn.Module, shared: set[int], before: "Stash | None", is_last: bool):
        self.offload, self.layer, self.before, self.is_last = offload, layer, before, is_last
        self.staying = shared  # and the parameters, as they are met
        # of those that somebody still needs: a layer below all that is trained keeps nothing, though much was packed
        self.items: MutableMapping[tuple[int, torch.dtype], Item] = WeakValueDictionary()
        self.event: Any = None  # of the copies that were asked for last
        self.is_back = False

    def __enter__(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        del self._hooks  # which holds the stash
        self._send()
        if self.before:
            self.before._release_device_memory()

    def pack(self, x: Tensor) -> Tensor | View:
        if x.device.type != self.offload.device.type:
            return x  # of the host already
        x, size = x.detach(), x.untyped_storage().nbytes()
        key = _key(x)
        if self.is_last or size < max(1, self.offload.smallest) or self._stays(key, x.dtype):
            return x
        item = self.items.setdefault((key, x.dtype), Item())
        if item.here is None:
            item.here = x.as_strided((size // x.element_size(),), (1,), 0)
        return View(item, x.shape, x.stride(), x.storage_offset())

    def unpack(self, kept: Tensor | View) -> Tensor:
        self._prefetch()
        self._wait()
        if self.before:
            self.before._prefetch()  # one layer ahead
        if isinstance(kept, Tensor):
            return kept
        assert kept.item.here is not None
        return kept.item.here.as_strided(kept.shape, kept.stride, kept.offset)

    def _stays(self, key: int, dtype: torch.dtype) -> bool:
        if key not in self.staying and (key, dtype) not in self.items:
            self.staying.update(
                map(_key, self.layer.parameters())
            )  # again for what is new: FSDP makes them whole by parts
        return key in self.staying

    def _send(self) -> None:
        """To the host, after what the device computes now."""
        going = self.offload.going
        going.wait_for_device()
        for item in self.items.values():
            assert item.here is not None
            item.there = going.to_host(item.here)
        self.event = going.record_event()

    def _release_device_memory(self) -> None:
        """Of what has been sent: the device uses its memory again after the copies."""
        self._wait()
        for item in self.items.values():
            item.here = None

    def _prefetch(self) -> None:
        if self.is_back:
            return
        self.is_back, coming = True, self.offload.coming
        coming.wait_for_device()
        for item in self.items.values():
            if item.here is None:
                assert item.there is not None
                item.here = coming.to_device(item.there, self.offload.device)
        self.event = coming.record_event()

    def _wait(self) -> None:
        self.offload.coming.make_device_wait(self.event)
        self.event = None


def _key(x: Tensor) -> int:
    return (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()._cdata
