"""The routed experts: y[t] = sum_k topk_weights[t, k] * down[e] swiglu(gate_up[e] x[t]), e = topk_ids[t, k].

Tokens are sorted by expert once, so that each projection is one grouped matmul; no loop over experts, no host sync. Backward
gathers the rows anew and runs swiglu again: of the intermediates only gate_up's output is kept. With h = swiglu(…) of a row
and d = down^T grad_y, the gradient of the row's weight, grad_y . (down h), is d . h: down's output is not needed for it.
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
    """x [T, H]; topk_ids [T, K] int; topk_weights [T, K]; gate_up_proj [E, 2I, H], gate rows first; down_proj [E, H, I].

    Returns [T, H] in x's dtype; the sum over K runs in fp32. Experts without tokens get zero gradients. `primitives`: the
    module whose functions do the work.
    """
    return _Experts.apply(x, topk_ids, topk_weights, gate_up_proj, down_proj, primitives)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, do: ModuleType
    ) -> Tensor:
        rows, place, ends = do.permute(x, ids, len(gate_up_proj))
        gate_up = do.grouped_matmul(rows, gate_up_proj.mT, ends)  # [T*K, 2I]
        out = do.grouped_matmul(do.swiglu(gate_up), down_proj.mT, ends)  # [T*K, H]
        ctx.save_for_backward(x, ids, weights, gate_up_proj, down_proj, gate_up, place, ends)
        ctx.do = do
        return do.unpermute(out, place, weights)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, weights, gate_up_proj, down_proj, gate_up, place, ends = ctx.saved_tensors
        need_x, _, _, need_gate_up, need_down, _ = ctx.needs_input_grad
        do = ctx.do
        grad_out = do.sorted_rows(grad_y, ids, place)  # [T*K, H], not yet times the row's weight
        grad_hidden = do.grouped_matmul(grad_out, down_proj, ends)
        dots, hidden, grad_gate_up = hidden_backward(do, grad_hidden, gate_up, do.weight_of_row(weights, place))
        del grad_hidden
        grad_weights = dots.index_select(0, place).view_as(weights)
        grad_down = do.grouped_weight_grad(grad_out, hidden, ends) if need_down else None
        del hidden
        grad_x = grad_gate_up_proj = None
        if need_gate_up:
            rows = do.sorted_rows(x, ids, place, grad_out)
            grad_gate_up_proj = do.grouped_weight_grad(grad_gate_up, rows, ends)
            del rows
        del grad_out
        if need_x:
            grad_x = do.permute_backward(do.grouped_matmul(grad_gate_up, gate_up_proj, ends), place, ids.shape[1])
        return grad_x, None, grad_weights, grad_gate_up_proj, grad_down, None


def hidden_backward(
    do: ModuleType, grad_hidden: Tensor, gate_up: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through swiglu: grad_hidden [N, I] before the row's weight [N, 1] and changed in place, gate_up [N, 2I].

    -> the gradients of the rows' weights [N]; hidden [N, I], times the weight; the gradient of gate_up [N, 2I].
    """
    hidden = do.swiglu(gate_up)
    dots = do.weigh(hidden, grad_hidden, weight)
    return dots, hidden, do.swiglu_backward(grad_hidden, gate_up)
