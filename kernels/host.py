"""Copies from the host to a device that do not wait for the device."""

import torch
from torch import Tensor


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
