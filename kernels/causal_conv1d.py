"""Depthwise causal convolution with silu over packed sequences.

y[t, c] = silu(sum_j weight[c, K-1-j] * x[t-j, c]), over those j for which t-j is in t's sequence.
Only x is saved for backward. Source: the short convolution of Mamba, arXiv:2312.00752.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.host import to_device
from kernels.native import BLOCK, working_dtype


def causal_conv1d(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [T, C], weight [C, K], cu_seqlens [S+1] on the CPU -> y [T, C]."""
    return _CausalConv1d.apply(x, weight, cu_seqlens)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.cu_seqlens = cu_seqlens
        y = x.new_empty(x.shape)
        taps = weight.to(working_dtype(x)).T.flip(0).contiguous()  # [K, C], in the order of j
        for block in _blocks(x, len(taps), cu_seqlens):
            y[block.rows] = F.silu(block.convolve(taps))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        taps = weight.to(working_dtype(x)).T.flip(0).contiguous()
        grad_x, grad_taps = x.new_empty(x.shape), torch.zeros_like(taps)
        before = len(taps) - 1
        carry = taps.new_zeros(before, x.shape[1])  # the next block's contribution to this one's last rows
        for block in reversed(list(_blocks(x, len(taps), ctx.cu_seqlens))):
            y = block.convolve(taps)
            g = torch.ops.aten.silu_backward(grad[block.rows].to(y.dtype), y)
            count = len(g)
            spread = taps.new_zeros(before + count, x.shape[1])  # gradient of the block and the rows before it
            spread[count:] = carry
            for j, tap in enumerate(taps):
                inside = block.inside(g, j)
                spread[before - j : before - j + count].addcmul_(inside, tap)
                if ctx.needs_input_grad[1]:
                    grad_taps[j] += (inside * block.shifted(j)).sum(0)
            grad_x[block.rows] = spread[before:]
            carry = spread[:before]
        return grad_x, grad_taps.flip(0).T.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


class _Block:
    """A few rows of x and the K-1 rows before them, zeros before the first."""

    def __init__(self, x: Tensor, rows: slice, width: int, offset: Tensor):
        self.rows, self.before, self.count = rows, width - 1, rows.stop - rows.start
        self.offset = offset[rows]  # [n] each row's position in its sequence
        self.has_start = bool((self.offset < self.before).any())
        self.x = torch.zeros(self.before + self.count, x.shape[1], dtype=working_dtype(x), device=x.device)
        start = max(0, rows.start - self.before)
        self.x[self.before - (rows.start - start) :] = x[start : rows.stop]

    def shifted(self, j: int) -> Tensor:
        """The block's rows, shifted: row t holds row t-j. [n, C]"""
        return self.x[self.before - j : self.before - j + self.count]

    def inside(self, x: Tensor, j: int) -> Tensor:
        """x [n, C] with zeros where t-j lies in another sequence."""
        if j == 0 or not self.has_start:
            return x
        outside = to_device(self.offset < j, x.device)
        return x.masked_fill(outside[:, None], 0)

    def convolve(self, taps: Tensor) -> Tensor:
        """taps [K, C] -> [n, C]"""
        y = self.shifted(0) * taps[0]
        for j in range(1, len(taps)):
            y.addcmul_(self.inside(self.shifted(j), j), taps[j])
        return y


def _blocks(x: Tensor, width: int, cu_seqlens: Tensor) -> Iterator[_Block]:
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    offset = torch.arange(len(x), dtype=starts.dtype) - starts
    size = max(width, BLOCK // max(1, x.shape[1])) if x.is_cpu else max(1, len(x))
    for start in range(0, len(x), size):
        yield _Block(x, slice(start, min(start + size, len(x))), width, offset)
