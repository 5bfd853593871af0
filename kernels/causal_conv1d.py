"""Depthwise causal convolution with silu, which starts anew at every sequence.

y[t, c] = silu(sum_j weight[c, K-1-j] * x[t-j, c]), the sum over j with t-j inside t's own sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.native import working_dtype


def causal_conv1d(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [T, C], weight [C, K], cu_seqlens [S+1] on the CPU -> y [T, C]."""
    length, width = x.shape[0], weight.shape[-1]
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    offset = (torch.arange(length, dtype=starts.dtype) - starts).to(
        x.device, non_blocking=True
    )  # [T] inside its sequence
    x32, w32 = x.to(working_dtype(x)), weight.to(working_dtype(x))
    y = x32 * w32[:, -1]
    for j in range(1, width):
        shifted = F.pad(x32, (0, 0, j, 0))[:length] * (offset >= j)[:, None]
        y = y + shifted * w32[:, -1 - j]
    return F.silu(y).to(x.dtype)
