"""What the host has made, sent to a device without waiting for it."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x of the host, on a device; on the host itself x.

    By way of page-locked memory, which torch keeps until the copy is done. Of other memory torch_npu passes on the address
    alone (LaunchAsyncCopyTask of its task queue), to be read later, when a tensor that nobody holds has long given it back.
    """
    if x.device.type == device.type:
        return x
    held = x if x.is_pinned() else torch.empty_like(x, pin_memory=True).copy_(x)
    return held.to(device, non_blocking=True)
