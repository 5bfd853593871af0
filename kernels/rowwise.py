"""What is done to each token's row by itself: the norms, the rotary embedding, SwiGLU. In fp32.

rms_norm        y = x / rms(x) * (1 + weight)         zero-centred weight, as Qwen3.5 stores it
rms_norm_gated  y = weight * x / rms(x) * silu(gate)  the delta net's output: gated after the norm
apply_rotary    (a, b) -> (a cos - b sin, b cos + a sin), on the first R of a head's D dimensions,
                paired half with half; backward rotates by the opposite angles
swiglu          silu(gate) * up, the two halves of the last dimension

rms(x) = sqrt(mean(x^2, -1) + eps). Sources: Zhang and Sennrich 2019, arXiv:1910.07467; Su et al.
2021, arXiv:2104.09864; Shazeer 2020, arXiv:2002.05202.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float, primitives: ModuleType = native) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype. Saves the inputs and one number per row."""
    return _RMSNorm.apply(x, weight, eps, primitives)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, primitives: ModuleType = native) -> Tensor:
    """x, gate [..., D], weight [D] -> [..., D] in x's dtype. Saves as rms_norm does."""
    return _RMSNormGated.apply(x, gate, weight, eps, primitives)


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, primitives: ModuleType = native
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hk, D]; cos, sin [T, R/2] fp32, one angle per pair -> rotated q, k.

    Saves only the angles, which all layers share.
    """
    return _Rotary.apply(q, k, cos, sin, primitives)


def swiglu(x: Tensor, primitives: ModuleType = native) -> Tensor:
    """x [..., 2I], gate first -> [..., I]. Saves only x."""
    return _SwiGLU.apply(x, primitives)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, ops: ModuleType) -> Tensor:
        y, rstd = ops.zero_centred_rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.ops = ops
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad[1]
        grad_x, grad_weight = ctx.ops.rms_norm_backward(grad, x, weight.to(rstd.dtype) + 1, rstd, need)
        return grad_x, grad_weight.to(weight.dtype) if need else None, None, None


class _RMSNormGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, ops: ModuleType) -> Tensor:
        y, rstd = ops.rms_norm_gated(x, gate, weight, eps)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.eps, ctx.ops = eps, ops
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, rstd = ctx.saved_tensors
        need, inputs = ctx.needs_input_grad[2], (x, gate, weight, rstd, ctx.eps)
        grad_x, grad_gate, grad_weight = ctx.ops.rms_norm_gated_backward(grad, *inputs, need)
        return grad_x, grad_gate, grad_weight.to(weight.dtype) if need else None, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ops: ModuleType) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.ops = ops
        return ops.rotate(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *ctx.ops.rotate(grad_q, grad_k, cos, -sin), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: ModuleType) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ops = ops
        return ops.swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ops.swiglu_backward(grad, *ctx.saved_tensors), None
