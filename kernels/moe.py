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


def moe_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    primitives: ModuleType = native,
) -> Tensor:
    """x [T, H], topk_ids [T, K] int, topk_weights [T, K] -> y [T, H] in x's dtype; sums in fp32.

    gate_up_proj [E, 2I, H], gate rows first; down_proj [E, H, I]. Experts without tokens get zero
    gradients. primitives: the module that implements permute, grouped_matmul and so on.
    """
    return _Experts.apply(x, topk_ids, topk_weights, gate_up_proj, down_proj, primitives)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ops: ModuleType
    ) -> Tensor:
        rows, row_of_slot, ends = ops.permute(x, ids, len(gate_up_proj))
        gate_up = ops.grouped_matmul(rows, gate_up_proj.mT, ends)  # [T*K, 2I]
        out = ops.grouped_matmul(ops.swiglu(gate_up), down_proj.mT, ends)  # [T*K, H]
        ctx.save_for_backward(x, ids, weights, gate_up_proj, down_proj, gate_up, row_of_slot, ends)
        ctx.ops = ops
        return ops.unpermute(out, row_of_slot, weights)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, weights, gate_up_proj, down_proj, gate_up, row_of_slot, ends = ctx.saved_tensors
        need_x, _, _, need_gate_up, need_down, _ = ctx.needs_input_grad
        ops = ctx.ops
        grad_out = ops.sorted_rows(grad_y, ids, row_of_slot)  # [T*K, H], without the routing weight
        grad_hidden = ops.grouped_matmul(grad_out, down_proj, ends)
        dots, hidden, grad_gate_up = hidden_backward(ops, grad_hidden, gate_up, ops.weight_of_row(weights, row_of_slot))
        del grad_hidden
        grad_weights = dots.index_select(0, row_of_slot).view_as(weights)
        grad_down = ops.grouped_weight_grad(grad_out, hidden, ends) if need_down else None
        del hidden
        grad_x = grad_gate_up_proj = None
        if need_gate_up:
            rows = ops.sorted_rows(x, ids, row_of_slot, grad_out)
            grad_gate_up_proj = ops.grouped_weight_grad(grad_gate_up, rows, ends)
            del rows
        del grad_out
        if need_x:
            grad_x = ops.permute_backward(
                ops.grouped_matmul(grad_gate_up, gate_up_proj, ends), row_of_slot, ids.shape[1]
            )
        return grad_x, None, grad_weights, grad_gate_up_proj, grad_down, None


def hidden_backward(
    ops: ModuleType, grad_hidden: Tensor, gate_up: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through swiglu and the routing weights.

    grad_hidden [N, I] without the routing weight (overwritten), gate_up [N, 2I], weight [N, 1] ->
    the weights' gradients [N]; hidden [N, I], times the weight; the gradient of gate_up [N, 2I].
    """
    hidden = ops.swiglu(gate_up)
    dots = ops.weigh(hidden, grad_hidden, weight)
    return dots, hidden, ops.swiglu_backward(grad_hidden, gate_up)
