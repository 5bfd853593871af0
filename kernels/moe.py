"""The routed experts of a mixture of experts.

y[t] = sum_k topk_weights[t, k] * down[e] swiglu(gate_up[e] x[t]), with e = topk_ids[t, k].

Slot t*K+k is token t's k-th choice; rows are the slots sorted by expert. They are sorted once, so
that each projection is one grouped matmul: no loop over experts, no host sync. Only gate_up's
output is saved; backward gathers the rows and computes swiglu again. With h = swiglu(…) of a row
and d = down^T grad_y, the gradient of its routing weight, grad_y . (down h), is d . h, so down's
output is not needed. Source: Gale et al. 2022, MegaBlocks, arXiv:2211.15841.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import native
from kernels.moe_lora import ExpertAdapters, projections, stacks
from kernels.recompute_cache import RecomputeCache, skips_experts_output


def moe_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    primitives: ModuleType = native,
    adapters: ExpertAdapters | None = None,
    recompute_cache: RecomputeCache | None = None,
) -> Tensor:
    """x [T, H], topk_ids [T, K] int, topk_weights [T, K] -> y [T, H] in x's dtype; sums in fp32.

    gate_up_proj [E, 2I, H], gate rows first; down_proj [E, H, I]. Experts without tokens get zero
    gradients. primitives: the module that implements permute, grouped_matmul and so on. adapters:
    what is added to the projections, see moe_lora.py. recompute_cache: of the layer.
    """
    options = primitives, adapters.scale if adapters else 1.0, skips_experts_output(recompute_cache)
    return _Experts.apply(options, x, topk_ids, topk_weights, *stacks(gate_up_proj, down_proj, adapters))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: tuple[ModuleType, float, bool], x: Tensor, ids: Tensor, weights: Tensor, *stacks: Tensor
    ) -> Tensor:
        ops, scale, skips_output = options
        rows, row_of_slot, ends = ops.permute(x, ids, len(stacks[0]))
        gate_up_proj, down_proj = projections(ops, ends, scale, stacks)
        gate_up = gate_up_proj.forward(rows)  # [T*K, 2I]
        del rows
        ctx.save_for_backward(x, ids, weights, gate_up, row_of_slot, ends, *stacks)
        ctx.ops, ctx.scale = ops, scale
        if skips_output:
            return torch.empty_like(x)
        out = down_proj.forward(ops.swiglu(gate_up))  # [T*K, H]
        return ops.unpermute(out, row_of_slot, weights)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, weights, gate_up, row_of_slot, ends, *stacks = ctx.saved_tensors
        need_x, for_gate_up, for_down = ctx.needs_input_grad[1], ctx.needs_input_grad[4:7], ctx.needs_input_grad[7:]
        ops = ctx.ops
        gate_up_proj, down_proj = projections(ops, ends, ctx.scale, stacks)
        grad_out = ops.sorted_rows(grad_y, ids, row_of_slot)  # [T*K, H], without the routing weight
        low = down_proj.low(grad_out)
        grad_hidden = down_proj.backward(grad_out, low)
        dots, hidden, grad_gate_up = hidden_backward(ops, grad_hidden, gate_up, ops.weight_of_row(weights, row_of_slot))
        del grad_hidden
        grad_weights = dots.index_select(0, row_of_slot).view_as(weights)
        of_down = down_proj.gradients(for_down, hidden, grad_out, low)
        del hidden
        low = gate_up_proj.low(grad_gate_up)
        rows = ops.sorted_rows(x, ids, row_of_slot, grad_out) if any(for_gate_up) else None
        of_gate_up = gate_up_proj.gradients(for_gate_up, rows, grad_gate_up, low)
        del rows, grad_out
        grad_x = None
        if need_x:
            grad_x = ops.permute_backward(gate_up_proj.backward(grad_gate_up, low), row_of_slot, ids.shape[1])
        return None, grad_x, None, grad_weights, *of_gate_up, *of_down


def hidden_backward(
    ops: ModuleType, grad_hidden: Tensor, gate_up: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through swiglu and the routing weights.

    grad_hidden [N, I] without the routing weight (overwritten or not), gate_up [N, 2I], weight
    [N, 1] -> the weights' gradients [N]; hidden [N, I], times the weight; gate_up's gradient.
    """
    hidden = ops.swiglu(gate_up)
    dots, grad_hidden = ops.weigh(hidden, grad_hidden, weight)
    return dots, hidden, ops.swiglu_backward(grad_hidden, gate_up)
