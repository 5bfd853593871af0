"""Differentiable collectives of fixed shapes, whose backward is the opposite exchange."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor


def to_heads(group: dist.ProcessGroup, *outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """From tokens to heads: each output's parts [T/U, H, …] -> [T, sum of the parts' H/U * …].

    All parts travel in one message; wider dtypes are viewed as several elements of the narrowest.
    """
    parts = [part for output in outputs for part in output]
    return _ToHeads.apply(group, [len(output) for output in outputs], *parts)


def to_tokens(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """From heads to tokens: x [T, H/U, D] -> [T/U, H, D]"""
    slices = rearrange(x, "(u t) h d -> u t h d", u=group.size())
    return rearrange(_Exchange.apply(group, slices), "u t h d -> t (u h) d")


def exchange(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """All-to-all: x [U, …], a slice for each rank -> [U, …], a slice from each. No autograd."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return exchange(group, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, exchange(ctx.group, grad)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, counts: list[int], *parts: Tensor) -> tuple[Tensor, ...]:
        size, dtype = group.size(), min((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        blocks = [rearrange(_view_as(dtype, part), "t (u h) ... -> u t h ...", u=size) for part in parts]
        widths = [block.shape[2:].numel() for block in blocks]
        send = torch.empty(size, len(parts[0]), sum(widths), dtype=dtype, device=parts[0].device)
        for target, block in zip(send.split(widths, dim=2), blocks, strict=True):
            target.unflatten(2, block.shape[2:]).copy_(block)
        received, parts_left = exchange(group, send).flatten(0, 1), iter(zip(widths, parts, strict=True))
        ctx.group, ctx.dtype, ctx.widths = group, dtype, widths
        ctx.parts = [(part.shape, part.dtype) for part in parts]
        outputs = [[next(parts_left) for _ in range(count)] for count in counts]
        columns = received.split([sum(width for width, _ in output) for output in outputs], dim=1)
        return tuple(_view_as(output[0][1].dtype, x) for x, output in zip(columns, outputs, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        send = torch.cat([_view_as(ctx.dtype, grad) for grad in grads], dim=1)  # [T, all widths]
        received = exchange(ctx.group, send.unflatten(0, (ctx.group.size(), -1))).split(ctx.widths, dim=2)
        parts = zip(received, ctx.parts, strict=True)
        return None, None, *(_view_as(dtype, x.transpose(0, 1).flatten(1)).view(shape) for x, (shape, dtype) in parts)


def _view_as(dtype: torch.dtype, x: Tensor) -> Tensor:
    """The bytes of x as elements of `dtype`."""
    return x if x.dtype == dtype else x.contiguous().view(dtype)


class Gather(torch.autograd.Function):
    """x [N, …] of each rank -> [U * N, …]"""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * len(x), *x.shape[1:])
        dist.all_gather(list(out.chunk(group.size())), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, exchange(ctx.group, grad.unflatten(0, (ctx.group.size(), -1))).sum(0)


class Sum(torch.autograd.Function):
    """The sum of all ranks' x. Backward is for the rank's own x; FSDP sums gradients over ranks."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
