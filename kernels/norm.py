"""RMS norms, computed in fp32. Backward saves the inputs and one number per row.

rms_norm        y = x / rms(x) * (1 + weight)         zero-centred weight, as Qwen3.5 stores it
rms_norm_gated  y = weight * x / rms(x) * silu(gate)  the delta net's output: gated after the norm

rms(x) = sqrt(mean(x^2, -1) + eps). Source: Zhang and Sennrich 2019; arXiv:1910.07467.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.native import row_blocks, working_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype."""
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate [..., D], weight [D] -> [..., D] in x's dtype."""
    return _RMSNormGated.apply(x, gate, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = _scales(x)
        factor = 1 + weight.to(scale.dtype)
        for part, r, out in row_blocks(_rows(x), scale, _rows(y)):
            x_hat = _normed(part.to(r.dtype), r, eps)
            out.copy_(x_hat.mul_(factor))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        factor = 1 + weight.to(scale.dtype)
        grad_weight = torch.zeros_like(factor)
        for part, g, r, out in row_blocks(_rows(x), _rows(grad), scale, _rows(grad_x)):
            x_hat, g = part.to(r.dtype) * r, g.to(r.dtype)
            grad_weight += (g * x_hat).sum(0)
            out.copy_(_norm_backward(x_hat, g * factor, r))
        return grad_x, grad_weight.to(weight.dtype), None


class _RMSNormGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = _scales(x)
        factor = weight.to(scale.dtype)
        for part, z, r, out in row_blocks(_rows(x), _rows(gate), scale, _rows(y)):
            x_hat = _normed(part.to(r.dtype), r, eps)
            out.copy_(x_hat.mul_(factor).mul_(torch.nn.functional.silu(z.to(r.dtype))))
        ctx.save_for_backward(x, gate, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gate, weight, scale = ctx.saved_tensors
        grad_x, grad_gate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
        factor = weight.to(scale.dtype)
        grad_weight = torch.zeros_like(factor)
        tensors = _rows(x), _rows(gate), _rows(grad), scale, _rows(grad_x), _rows(grad_gate)
        for part, z, g, r, out, gate_out in row_blocks(*tensors):
            x_hat, z, g = part.to(r.dtype) * r, z.to(r.dtype), g.to(r.dtype)
            sigmoid = z.sigmoid()
            silu = z * sigmoid
            g_hat = g * x_hat
            grad_weight += (g_hat * silu).sum(0)
            # silu' = sigmoid (1 + z - silu)
            gate_out.copy_((z - silu).add_(1).mul_(sigmoid).mul_(g_hat).mul_(factor))
            out.copy_(_norm_backward(x_hat, silu.mul_(g).mul_(factor), r))
        return grad_x, grad_gate, grad_weight.to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    """x [..., D] -> [N, D], a view if x is contiguous."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def _scales(x: Tensor) -> Tensor:
    """Uninitialised [N, 1], for 1 / rms of each row."""
    return torch.empty(x.shape[:-1].numel(), 1, dtype=working_dtype(x), device=x.device)


def _normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x [n, D] in working precision -> x / rms(x). Writes 1 / rms(x) into scale [n, 1]."""
    torch.rsqrt(torch.linalg.vecdot(x, x)[:, None].div_(x.shape[1]).add_(eps), out=scale)
    return x * scale


def _norm_backward(x_hat: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """x_hat [n, D], its gradient (overwritten), scale [n, 1] -> the gradient of x [n, D]."""
    mean = torch.linalg.vecdot(grad, x_hat)[:, None].div_(grad.shape[1])
    return grad.addcmul_(x_hat, mean, value=-1).mul_(scale)
