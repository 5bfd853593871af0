"""kernels/causal_conv1d.py in Triton, for four taps.

Both kernels go down the rows of a chunk with a row's channels as one vector and hold the last rows
in registers, so that each value is read once. Only x is saved for backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.chunks import chunk_tables
from kernels.triton.tiles import CHANNELS, CONV_ROWS, VECTOR_CORES, cores, operator, power_of_two, programs

TAPS = 4


@triton.jit
def _row(x, first, at, stride, lane, mask):
    """Row first + at of x [T, …], its channels `lane` -> fp32"""
    pointer = x + tl.cast(first + at, tl.int64) * stride + lane
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count_chunks", "stride"])
def forward(x, taps, chunks, y, count_chunks, stride, C: tl.constexpr, BC: tl.constexpr):
    """x [T, C] with rows `stride` apart, taps [4, C] -> y [T, C]. A task: a chunk, BC channels."""
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    for task in range(tl.program_id(0), count_chunks * BLOCKS, tl.num_programs(0)):
        chunk, lane = task // BLOCKS, task % BLOCKS * BC + tl.arange(0, BC)
        start, count = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1)
        before = tl.load(chunks + 4 * chunk + 2)
        mask = lane < C
        w0 = tl.load(taps + lane, mask=mask, other=0.0).to(tl.float32)
        w1 = tl.load(taps + C + lane, mask=mask, other=0.0).to(tl.float32)
        w2 = tl.load(taps + 2 * C + lane, mask=mask, other=0.0).to(tl.float32)
        w3 = tl.load(taps + 3 * C + lane, mask=mask, other=0.0).to(tl.float32)
        # the rows before the chunk; zeros before the sequence, whose first row is loaded instead
        x1 = tl.where(before > 0, _row(x, start, 0 - tl.minimum(before, 1), stride, lane, mask), 0.0)
        x2 = tl.where(before > 1, _row(x, start, 0 - tl.minimum(before, 2), stride, lane, mask), 0.0)
        x3 = tl.where(before > 2, _row(x, start, 0 - tl.minimum(before, 3), stride, lane, mask), 0.0)
        for i in range(count):
            x0 = _row(x, start, i, stride, lane, mask)
            sums = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            pointer = y + tl.cast(start + i, tl.int64) * C + lane
            tl.store(pointer, (sums * tl.sigmoid(sums)).to(y.dtype.element_ty), mask=mask)
            x3 = x2
            x2 = x1
            x1 = x0


@triton.jit(do_not_specialize=["count_chunks", "stride"])
def backward(
    x, taps, grad, chunks, grad_x, parts, count_chunks, stride, C: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Writes grad_x [T, C] and parts [P, 4, C], whose sum is the taps' gradient; grad [T, C].

    A program takes BC channels of one chunk after another. The gradient of row i needs silu's
    gradient in rows i to i + 3, so the loop runs three rows ahead of what it writes.
    """
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    walker, lane = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    mask = lane < C
    w0 = tl.load(taps + lane, mask=mask, other=0.0).to(tl.float32)
    w1 = tl.load(taps + C + lane, mask=mask, other=0.0).to(tl.float32)
    w2 = tl.load(taps + 2 * C + lane, mask=mask, other=0.0).to(tl.float32)
    w3 = tl.load(taps + 3 * C + lane, mask=mask, other=0.0).to(tl.float32)
    d0, d1 = tl.zeros([BC], dtype=tl.float32), tl.zeros([BC], dtype=tl.float32)
    d2, d3 = tl.zeros([BC], dtype=tl.float32), tl.zeros([BC], dtype=tl.float32)
    for chunk in range(walker, count_chunks, tl.num_programs(0) // BLOCKS):
        start, count = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1)
        before, after = tl.load(chunks + 4 * chunk + 2), tl.load(chunks + 4 * chunk + 3)
        x1 = tl.where(before > 0, _row(x, start, 0 - tl.minimum(before, 1), stride, lane, mask), 0.0)
        x2 = tl.where(before > 1, _row(x, start, 0 - tl.minimum(before, 2), stride, lane, mask), 0.0)
        x3 = tl.where(before > 2, _row(x, start, 0 - tl.minimum(before, 3), stride, lane, mask), 0.0)
        g0, g1 = tl.zeros([BC], dtype=tl.float32), tl.zeros([BC], dtype=tl.float32)
        g2 = tl.zeros([BC], dtype=tl.float32)
        for i in range(count + 3):
            at = tl.minimum(i, count + after - 1)
            x0 = _row(x, start, at, stride, lane, mask)
            sums = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            sigmoid = tl.sigmoid(sums)
            # silu' = sigmoid (1 + s - s sigmoid); zero behind the sequence's end
            g3 = _row(grad, start, at, C, lane, mask) * sigmoid * (1.0 + sums - sums * sigmoid)
            g3 = tl.where(i < count + after, g3, 0.0)
            d_silu = tl.where(i < count, g3, 0.0)
            d0 += d_silu * x0
            d1 += d_silu * x1
            d2 += d_silu * x2
            d3 += d_silu * x3
            if i >= 3:
                d_x = w0 * g0 + w1 * g1 + w2 * g2 + w3 * g3
                pointer = grad_x + tl.cast(start + i - 3, tl.int64) * C + lane
                tl.store(pointer, d_x.to(grad_x.dtype.element_ty), mask=mask)
            x3 = x2
            x2 = x1
            x1 = x0
            g0 = g1
            g1 = g2
            g2 = g3
    pointer = parts + walker * (4 * C) + lane
    tl.store(pointer, d0, mask=mask)
    tl.store(pointer + C, d1, mask=mask)
    tl.store(pointer + 2 * C, d2, mask=mask)
    tl.store(pointer + 3 * C, d3, mask=mask)


# ── Launches, as operators of torch ───────────────────────────────────────────────────────────────


def _channels(C: int, most: int) -> tuple[int, int]:
    """-> channels per program, programs per row"""
    size = min(most, power_of_two(C))
    return size, -(-C // size)


@operator("causal_conv1d::forward", lambda x, taps, chunks, channels: x.new_empty(x.shape))
def launch_forward(x: Tensor, taps: Tensor, chunks: Tensor, channels: int) -> Tensor:
    """x [T, C], taps [4, C] of rows t, t-1, … -> y [T, C]; channels: maximum per program"""
    y, C, N = x.new_empty(x.shape), x.shape[1], len(chunks)
    size, blocks = _channels(C, channels)
    forward[(programs(N * blocks, x.device),)](x, taps, chunks, y, N, x.stride(0), C=C, BC=size)
    return y


def _gradients(x: Tensor, chunks: Tensor, channels: int, cores: int) -> tuple[Tensor, Tensor]:
    _, blocks = _channels(x.shape[1], channels)
    count = max(1, min(len(chunks), cores // blocks))  # programs, each of which sums over its chunks
    parts = torch.empty(count, TAPS, x.shape[1], dtype=torch.float32, device=x.device)
    return x.new_empty(x.shape), parts


@operator(
    "causal_conv1d::backward", lambda x, taps, grad, chunks, channels: _gradients(x, chunks, channels, VECTOR_CORES)
)
def launch_backward(x: Tensor, taps: Tensor, grad: Tensor, chunks: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """-> grad_x [T, C], parts [P, 4, C] fp32, whose sum is the taps' gradient"""
    grad_x, parts = _gradients(x, chunks, channels, cores(x.device, products=False))
    size, blocks = _channels(x.shape[1], channels)
    backward[(len(parts) * blocks,)](
        x, taps, grad, chunks, grad_x, parts, len(chunks), x.stride(0), C=x.shape[1], BC=size
    )
    return grad_x, parts


# ── The operator ──────────────────────────────────────────────────────────────────────────────────


def causal_conv1d(x: Tensor, weight: Tensor, cu_seqlens: Tensor, channels: int = CHANNELS) -> Tensor:
    """x [T, C], weight [C, 4], cu_seqlens [S+1] on the CPU -> y [T, C]. ValueError if not 4."""
    if weight.shape[1] != TAPS:
        raise ValueError(
            f"causal_conv1d: the Triton kernel has {TAPS} taps, the weight {weight.shape[1]}; set"
            " model.kernels.causal_conv1d=native"
        )
    if not len(x):
        return torch.zeros_like(x)
    chunks, _ = chunk_tables(cu_seqlens, CONV_ROWS, x.device)
    return _CausalConv1d.apply(x, weight, chunks, channels)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, chunks: Tensor, channels: int) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        ctx.save_for_backward(x, weight, chunks)
        ctx.channels = channels
        return launch_forward(x, _taps(weight), chunks, channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, chunks = ctx.saved_tensors
        grad_x, parts = launch_backward(x, _taps(weight), grad.contiguous(), chunks, ctx.channels)
        grad_weight = parts.sum(0).flip(0).T.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None


def _taps(weight: Tensor) -> Tensor:
    """weight [C, 4] -> [4, C], the tap of the row itself first"""
    return weight.T.flip(0).contiguous()
