"""RMS norms, in fp32 inside.

rms_norm        y = x / rms(x) * (1 + weight)         zero-centred weight, as Qwen3.5 stores it
rms_norm_gated  y = weight * x / rms(x) * silu(gate)  norm first, then the gate (the delta net's output)

rms(x) = sqrt(mean(x^2, -1) + eps). Source: Zhang and Sennrich 2019; arXiv:1910.07467.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.native import working_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype."""
    x32 = x.to(working_dtype(x))
    x_hat = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x_hat * (1 + weight.to(x32.dtype))).to(x.dtype)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate [..., D], weight [D] -> [..., D] in x's dtype."""
    x32 = x.to(working_dtype(x))
    x_hat = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (weight.to(x32.dtype) * x_hat * F.silu(gate.to(x32.dtype))).to(x.dtype)
