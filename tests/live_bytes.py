"""Bytes of the storages that are alive on a device, as operators make them and their last user lets go."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts each storage once, fake ones too; what was there before only if `hold` names it. `now`, and the highest, `peak`.

    What an operator takes for itself inside is not seen. Storages that FSDP empties and fills again are followed.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self.device_type, self.now, self.peak = device_type, 0, 0
        self._sizes: dict[int, int] = {}

    def hold(self, *tensors: Tensor) -> None:
        for storage in self._storages(tensors):
            if storage._cdata not in self._sizes:
                self._set(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self._gone, storage._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in self._storages(tree_leaves((args, kwargs))):
            if storage._cdata not in self._sizes:  # from before
                self._sizes[storage._cdata] = 0
                weakref.finalize(storage, self._gone, storage._cdata)
        out = func(*args, **(kwargs or {}))
        self.hold(*tree_leaves(out))
        return out

    def _storages(self, values):
        for x in values:
            if isinstance(x, Tensor):
                local = getattr(x, "_local_tensor", x)
                if local.device.type == self.device_type:
                    yield local.untyped_storage()

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    @property
    def _resized(self):
        def resize_(storage, size):
            found = self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, storage.nbytes())
            return found

        return resize_

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
