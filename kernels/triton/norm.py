"""rms_norm_gated of kernels/rowwise.py in Triton: one kernel forward, one backward.

Only x and gate are saved for backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.tiles import NORM_ELEMENTS, VECTOR_CORES, cores, operator, power_of_two


@triton.jit(do_not_specialize=["count_rows", "eps"])
def forward(x, gate, weight, y, eps, count_rows, D: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """x, gate [N, D], weight [D] -> y [N, D]. A task: ROWS rows; LANES: D up to a power of two."""
    row, lane = tl.arange(0, ROWS), tl.arange(0, LANES)
    factor = tl.load(weight + lane, mask=lane < D, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0), (count_rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        first = tl.cast(block, tl.int64) * ROWS * D
        offset = row[:, None] * D + lane[None, :]
        mask = (row < count_rows - block * ROWS)[:, None] & (lane < D)[None, :]
        wide = tl.load(x + first + offset, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(gate + first + offset, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
        result = wide * scale[:, None] * factor[None, :] * (z * tl.sigmoid(z))
        tl.store(y + first + offset, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count_rows", "eps"])
def backward(
    x, gate, weight, grad, grad_x, grad_gate, parts, eps, count_rows,
    D: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes grad_x, grad_gate [N, D] and parts [P, D], whose sum is the weight's gradient."""
    row, lane = tl.arange(0, ROWS), tl.arange(0, LANES)
    factor = tl.load(weight + lane, mask=lane < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for block in range(tl.program_id(0), (count_rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        first = tl.cast(block, tl.int64) * ROWS * D
        offset = row[:, None] * D + lane[None, :]
        mask = (row < count_rows - block * ROWS)[:, None] & (lane < D)[None, :]
        wide = tl.load(x + first + offset, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(gate + first + offset, mask=mask, other=0.0).to(tl.float32)
        d_y = tl.load(grad + first + offset, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
        x_hat, sigmoid = wide * scale[:, None], tl.sigmoid(z)
        d_weight += d_y * x_hat * (z * sigmoid)
        # silu' = sigmoid (1 + z - z sigmoid)
        d_gate = d_y * x_hat * factor[None, :] * sigmoid * (1.0 + z - z * sigmoid)
        tl.store(grad_gate + first + offset, d_gate.to(grad_gate.dtype.element_ty), mask=mask)
        d_hat = d_y * factor[None, :] * (z * sigmoid)
        d_x = (d_hat - x_hat * (tl.sum(d_hat * x_hat, axis=1) / D)[:, None]) * scale[:, None]
        tl.store(grad_x + first + offset, d_x.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(parts + tl.program_id(0) * D + lane, tl.sum(d_weight, axis=0), mask=lane < D)


# ── Launches, as operators of torch ───────────────────────────────────────────────────────────────


def _tile(D: int, elements: int) -> dict[str, int]:
    lanes = power_of_two(D)
    return {"D": D, "LANES": lanes, "ROWS": max(1, elements // lanes)}


def _programs(x: Tensor, elements: int, cores: int) -> int:
    """The number of programs, each of which sums over its tiles."""
    return max(1, min(-(-len(x) // _tile(x.shape[1], elements)["ROWS"]), cores))


@operator("rms_norm_gated::forward", lambda x, gate, weight, eps, elements: x.new_empty(x.shape))
def launch_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, elements: int) -> Tensor:
    """x, gate [N, D], weight [D] -> y [N, D]; elements: per tile"""
    y, count = x.new_empty(x.shape), _programs(x, elements, cores(x.device, False))
    forward[(count,)](x, gate, weight, y, eps, len(x), **_tile(x.shape[1], elements))
    return y


def _gradients(x: Tensor, gate: Tensor, elements: int, cores: int) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_gate = (t.new_empty(t.shape) for t in (x, gate))
    count = _programs(x, elements, cores)
    return grad_x, grad_gate, torch.empty(count, x.shape[1], dtype=torch.float32, device=x.device)


@operator(
    "rms_norm_gated::backward", lambda x, gate, weight, grad, eps, elements: _gradients(x, gate, elements, VECTOR_CORES)
)
def launch_backward(
    x: Tensor, gate: Tensor, weight: Tensor, grad: Tensor, eps: float, elements: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x and gate [N, D], parts [P, D] fp32, whose sum is the weight's gradient"""
    grad_x, grad_gate, parts = _gradients(x, gate, elements, cores(x.device, products=False))
    tile = _tile(x.shape[1], elements)
    backward[(len(parts),)](x, gate, weight, grad, grad_x, grad_gate, parts, eps, len(x), **tile)
    return grad_x, grad_gate, parts


# ── The operator ──────────────────────────────────────────────────────────────────────────────────


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, elements: int = NORM_ELEMENTS) -> Tensor:
    """x, gate [..., D], weight [D] -> [..., D] in x's dtype. elements: maximum per tile."""
    return _RMSNormGated.apply(x, gate, weight, eps, elements) if x.numel() else torch.zeros_like(x)


class _RMSNormGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, elements: int) -> Tensor:
        x_rows, gate_rows = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, gate))
        ctx.save_for_backward(x_rows, gate_rows, weight)
        ctx.eps, ctx.elements = eps, elements
        return launch_forward(x_rows, gate_rows, weight, eps, elements).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        rows = grad.reshape(x.shape).contiguous()
        grad_x, grad_gate, parts = launch_backward(x, gate, weight, rows, ctx.eps, ctx.elements)
        grad_weight = parts.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_x.view(grad.shape), grad_gate.view(grad.shape), grad_weight, None, None
