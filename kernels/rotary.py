"""Rotary position embedding on the first R of a head's D dimensions, paired half with half.

(a, b) -> (a cos - b sin, b cos + a sin), in fp32. Backward rotates the gradient by the opposite
angles and needs nothing else. Source: Su et al. 2021, arXiv:2104.09864.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.native import row_blocks


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hk, D]; cos, sin [T, R/2] fp32, one angle per pair -> rotated q, k."""
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for part, c, s, out in row_blocks(x, cos[:, None], sin[:, None], y):
        a, b = part[..., :half].to(c.dtype), part[..., half : 2 * half].to(c.dtype)
        out[..., :half] = a * c - b * s
        out[..., half : 2 * half] = b * c + a * s
        out[..., 2 * half :] = part[..., 2 * half :]
    return y
