"""From the host to a device: copies that do not wait; what lengths imply, made only once."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy x from the host to `device`, asynchronously; x itself if it is there already.

    The copy goes through page-locked memory, which torch keeps until the copy is done. Of pageable
    memory torch_npu only queues the address (LaunchAsyncCopyTask in its task queue) and reads it
    later, when the tensor may have been freed.
    """
    if x.device.type == device.type:
        return x
    pinned = x if x.is_pinned() else torch.empty_like(x, pin_memory=True).copy_(x)
    return pinned.to(device, non_blocking=True)


def computed_once(cu_seqlens: Tensor, key: Any, compute: Callable[[], T]) -> T:
    """compute(), derived from cu_seqlens and stored on it under `key`: all layers share it.

    It is freed with the batch. The key must contain all that the result depends on besides the
    lengths, which must not change.
    """
    derived = cu_seqlens.__dict__.setdefault("derived_from_lengths", {})
    if key not in derived:
        derived[key] = compute()
    return derived[key]
