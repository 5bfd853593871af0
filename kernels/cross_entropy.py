"""Fused output head and loss, sum(token_weights * cross_entropy(hidden weight^T, labels)).

The [T, V] logits are never held at once. The gradients are computed in forward, one chunk of tokens
at a time, while the chunk's logits exist: three matmuls in all, where a recomputing backward needs
four. The weight's gradient is summed over the chunks in fp32. Source: Wijmans et al. 2024, Cut Your
Losses, arXiv:2411.09009; gradients in forward: Liger Kernel, arXiv:2410.10989.

Where a token's weight is known only once all log-probabilities are, as in preference losses,
token_log_probs takes the fourth matmul: its backward computes the chunks' logits again.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import native

CHUNK_LOGITS = 1 << 27  # logits of one chunk, times the primitives' LOGIT_BLOCKS: 256 MB in bf16
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


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_rows: Tensor | None = None,
    primitives: ModuleType = native,
) -> Tensor:
    """The arguments of linear_cross_entropy -> log-probabilities of the labels [T] fp32.

    They are 0 without a label, and differentiable in hidden and weight; a weight that is frozen
    costs no gradient.
    """
    rows = primitives.rows_with_label(labels) if label_rows is None else label_rows
    return _TokenLogProbs.apply(hidden, weight, labels, rows, primitives)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, options: tuple
    ) -> tuple[Tensor, Tensor]:
        label_rows, grad_enabled, ops = options
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:2]]
        has_label = labels >= 0
        scales = token_weights.to(native.working_dtype(hidden)) * has_label
        token_loss, grad_hidden, grad_weight = _by_chunks(hidden, weight, labels, scales, label_rows, needs, ops)
        token_loss *= has_label
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(token_loss)
        return (token_loss * scales).sum(), token_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # in place, as [V, D] is large; autograd refuses a second backward through what has changed
        return *(None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors), None, None, None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, label_rows: Tensor, ops: ModuleType
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels, label_rows)
        ctx.ops = ops
        scales = torch.zeros(labels.shape, dtype=native.working_dtype(hidden), device=hidden.device)
        token_loss, *_ = _by_chunks(hidden, weight, labels, scales, label_rows, (False, False), ops)
        return token_loss.masked_fill_(labels < 0, 0).neg_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, label_rows = ctx.saved_tensors
        scales = -grad * (labels >= 0)
        needs = ctx.needs_input_grad[:2]
        _, grad_hidden, grad_weight = _by_chunks(hidden, weight, labels, scales, label_rows, needs, ctx.ops)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _by_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scales: Tensor,
    label_rows: Tensor,
    needs: Sequence[bool],
    ops: ModuleType,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> cross entropies [T], gradients of sum(scales * cross entropies) in hidden and weight.

    The weight's gradient is fp32 if it is a sum over chunks. needs: whether each gradient is
    needed. Tokens without a label take label 0, so their scales must be 0.
    """
    need_hidden, need_weight = needs
    targets, token_loss = labels.clamp(min=0), torch.zeros_like(scales)
    grad_hidden, grad_weight = torch.zeros_like(hidden) if need_hidden else None, None
    parts = chunks(label_rows, weight.shape[0], ops.LOGIT_BLOCKS)
    if need_weight:  # the first chunk writes, the others add; a single one has nothing to add to
        allocate = torch.empty if parts else torch.zeros
        dtype = scales.dtype if len(parts) > 1 else weight.dtype
        grad_weight = allocate(weight.shape, dtype=dtype, device=weight.device)
    # all chunks in the same memory, which is mapped and cleared once on a CPU
    logits = hidden.new_empty(len(parts[0][0]) if parts else 0, len(weight))
    for number, (rows, is_real) in enumerate(parts):
        h = hidden[rows]
        block = torch.mm(h, weight.T, out=logits[: len(rows)])
        loss, grad = ops.cross_entropy(block, targets[rows], scales[rows] * is_real, need_hidden or need_weight)
        token_loss.index_add_(0, rows, loss * is_real)
        if grad_hidden is not None:
            grad_hidden.index_add_(0, rows, ops.head_hidden_grad(grad, weight))
        if grad_weight is not None:
            ops.head_weight_grad(grad_weight, grad, h, add=number > 0)
    return token_loss, grad_hidden, grad_weight


def chunks(label_rows: Tensor, vocabulary: int, blocks: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The rows [c] of each chunk, and a mask [c] that is False for the last chunk's padding."""
    size = max(16, blocks * CHUNK_LOGITS // vocabulary)
    size -= size % ROW_MULTIPLE if size > ROW_MULTIPLE else 0
    padding = -len(label_rows) % min(size, ROW_MULTIPLE)
    rows = torch.cat([label_rows, label_rows[:1].expand(padding)])
    is_real = torch.arange(len(rows), device=rows.device) < len(label_rows)
    return list(zip(rows.split(size), is_real.split(size), strict=True)) if len(rows) else []
