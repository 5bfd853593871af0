"""Fused output head and loss, sum(token_weights * cross_entropy(hidden weight^T, labels)).

The [T, V] logits are never held at once. The gradients are computed in forward, one chunk of tokens
at a time, while the chunk's logits exist: three matmuls in all, where a recomputing backward needs
four. The weight's gradient is summed over the chunks in fp32. Source: Wijmans et al. 2024, Cut Your
Losses, arXiv:2411.09009; gradients in forward: Liger Kernel, arXiv:2410.10989.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import native

CHUNK_LOGITS = 1 << 27  # logits of one chunk: 256 MB in bf16
ROW_MULTIPLE = 32  # the last chunk is padded to a multiple of this many rows, so that few shapes occur


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    label_rows: Tensor | None = None,
    primitives: ModuleType = native,
) -> tuple[Tensor, Tensor]:
    """hidden [T, D], weight [V, D], labels [T] int64 (-100: no label), token_weights [T] fp32.

    label_rows [N] int64: indices of the tokens with a label; the others cost nothing. If None they
    are looked up on the host, and on an NPU, where that would sync, all tokens take part. Returns
    (loss, token_loss): loss is an fp32 scalar, differentiable in hidden and weight; token_loss [T]
    is fp32, detached and 0 without a label.
    """
    rows = primitives.rows_with_label(labels) if label_rows is None else label_rows
    options = rows, torch.is_grad_enabled(), primitives
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, options)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, options: tuple
    ) -> tuple[Tensor, Tensor]:
        label_rows, grad_enabled, ops = options
        wide = native.working_dtype(hidden)
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        has_label, targets = labels >= 0, labels.clamp(min=0)
        scales = token_weights.to(wide) * has_label
        token_loss = torch.zeros(labels.shape, dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        allocate = torch.empty if len(label_rows) else torch.zeros  # the first chunk writes, the others add
        grad_weight = allocate(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        for number, (rows, is_real) in enumerate(chunks(label_rows, weight.shape[0])):
            h = hidden[rows]
            loss, grad = ops.cross_entropy(h, weight, targets[rows], scales[rows] * is_real, need_hidden or need_weight)
            token_loss.index_add_(0, rows, loss * is_real)
            if grad_hidden is not None:
                grad_hidden.index_add_(0, rows, grad @ weight)
            if grad_weight is not None:
                ops.head_weight_grad(grad_weight, grad, h, add=number > 0)
        token_loss *= has_label
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype, ctx.slice = weight.dtype, ops.VOCABULARY_SLICE
        ctx.mark_non_differentiable(token_loss)
        return (token_loss * scales).sum(), token_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_loss).to(grad_hidden.dtype)
        if grad_weight is not None:
            scaled = torch.empty(grad_weight.shape, dtype=ctx.dtype, device=grad_weight.device)
            for part, out in zip(grad_weight.split(ctx.slice), scaled.split(ctx.slice), strict=True):
                out.copy_(part * grad_loss)  # all at once would be another [V, D] fp32 near the memory peak
            grad_weight = scaled
        return grad_hidden, grad_weight, None, None, None


def chunks(label_rows: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """The rows [c] of each chunk, and a mask [c] that is False for the last chunk's padding."""
    size = max(16, CHUNK_LOGITS // vocabulary)
    size -= size % ROW_MULTIPLE if size > ROW_MULTIPLE else 0
    padding = -len(label_rows) % min(size, ROW_MULTIPLE)
    rows = torch.cat([label_rows, label_rows[:1].expand(padding)])
    is_real = torch.arange(len(rows), device=rows.device) < len(label_rows)
    return list(zip(rows.split(size), is_real.split(size), strict=True)) if len(rows) else []
