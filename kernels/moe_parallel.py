"""Stand-in until the real one is there: gather all tokens, compute the own experts' share, sum and scatter."""

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import native
from kernels.kept import Kept
from kernels.moe import moe_experts


def moe_experts_parallel(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    group: dist.ProcessGroup,
    kept: Kept | None = None,
    primitives: ModuleType = native,
) -> Tensor:
    own, rank, T = len(gate_up_proj), dist.get_rank(group), len(x)
    counts = [torch.empty(1, dtype=torch.long) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([T]), group=group)
    sizes = [int(c) for c in counts]
    most = max(sizes)

    def pad(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(most - T, *t.shape[1:])])

    ids = _Gather.apply(pad(topk_ids), group) - rank * own
    mine = (ids >= 0) & (ids < own)
    weights = torch.where(mine, _Gather.apply(pad(topk_weights), group), 0)
    y = moe_experts(_Gather.apply(pad(x), group), ids.clamp(0, own - 1), weights, gate_up_proj, down_proj, primitives)
    return _Scatter.apply(y, group)[:T].clone()


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group), None
