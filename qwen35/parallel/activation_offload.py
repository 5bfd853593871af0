"""Activation offloading: what layers save for backward waits in host memory.

It is copied there while the next layer computes, and back while the backward of that layer runs.
The last layer's tensors stay on the device, because they are needed at once.
"""

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen35.device import CopyQueue

MIN_BYTES = 1 << 20  # smaller storages are not worth a copy


@dataclass
class Item:
    """One storage as a flat tensor, on the device, on the host or both."""

    on_device: Tensor | None = None
    on_host: Tensor | None = None


@dataclass(frozen=True)
class View:
    """A saved tensor: a view of an item."""

    item: Item
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any


class Offload:
    """The two copy queues of a device, shared by all layers and micro-batches."""

    def __init__(self, device: torch.device, min_bytes: int = MIN_BYTES):
        self.device, self.min_bytes = device, min_bytes
        self.to_host_queue, self.to_device_queue = CopyQueue(device), CopyQueue(device)

    def stash(self, layer: nn.Module, shared: Iterable[Tensor], previous: "Stash | None", is_last: bool) -> "Stash":
        """A stash for one forward of `layer`. `shared`: tensors of all layers, which stay here."""
        return Stash(self, layer, {_key(x) for x in shared}, previous, is_last)


class Stash:
    """A context around a layer's forward that offloads what autograd saves in it.

    Each storage is copied once; parameters are not, among them FSDP's unsharded weights, which FSDP
    frees. `pack` and `unpack` also serve tensors that are saved in other ways. A stash lives as
    long as something that it packed; it refers to the previous stash, never to the next.
    """

    def __init__(self, offload: Offload, layer: nn.Module, shared: set[int], previous: "Stash | None", is_last: bool):
        self.offload, self.layer, self.previous, self.is_last = offload, layer, previous, is_last
        self.excluded = shared  # _is_excluded adds the parameters
        # weak, so that unneeded items disappear: a layer below all trained parameters saves nothing
        self.items: MutableMapping[tuple[int, torch.dtype], Item] = WeakValueDictionary()
        self.event: Any = None  # after the copies that were queued last
        self.is_prefetched = False

    def __enter__(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        del self._hooks  # it refers to the stash
        self._copy_to_host()
        if self.previous:
            self.previous._release_device_memory()

    def pack(self, x: Tensor) -> Tensor | View:
        if x.device.type != self.offload.device.type:
            return x  # on the host already
        x, size = x.detach(), x.untyped_storage().nbytes()
        key = _key(x)
        if self.is_last or size < max(1, self.offload.min_bytes) or self._is_excluded(key, x.dtype):
            return x
        item = self.items.setdefault((key, x.dtype), Item())
        if item.on_device is None:
            item.on_device = x.as_strided((size // x.element_size(),), (1,), 0)
        return View(item, x.shape, x.stride(), x.storage_offset())

    def unpack(self, packed: Tensor | View) -> Tensor:
        self._prefetch()
        self._wait()
        if self.previous:
            self.previous._prefetch()  # one layer ahead
        if isinstance(packed, Tensor):
            return packed
        assert packed.item.on_device is not None
        return packed.item.on_device.as_strided(packed.shape, packed.stride, packed.offset)

    def _is_excluded(self, key: int, dtype: torch.dtype) -> bool:
        if key not in self.excluded and (key, dtype) not in self.items:
            # again for every new storage, because FSDP unshards a layer in several steps
            self.excluded.update(map(_key, self.layer.parameters()))
        return key in self.excluded

    def _copy_to_host(self) -> None:
        """Queue the copies to the host, after what the device computes now."""
        to_host_queue = self.offload.to_host_queue
        to_host_queue.wait_for_device()
        for item in self.items.values():
            assert item.on_device is not None
            item.on_host = to_host_queue.to_host(item.on_device)
        self.event = to_host_queue.record_event()

    def _release_device_memory(self) -> None:
        """Free the device memory of what has been copied, once the copies are done."""
        self._wait()
        for item in self.items.values():
            item.on_device = None

    def _prefetch(self) -> None:
        if self.is_prefetched:
            return
        self.is_prefetched, to_device_queue = True, self.offload.to_device_queue
        to_device_queue.wait_for_device()
        for item in self.items.values():
            if item.on_device is None:
                assert item.on_host is not None
                item.on_device = to_device_queue.to_device(item.on_host, self.offload.device)
        self.event = to_device_queue.record_event()

    def _wait(self) -> None:
        self.offload.to_device_queue.make_device_wait(self.event)
        self.event = None


def _key(x: Tensor) -> int:
    return (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()._cdata
