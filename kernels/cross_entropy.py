"""Fused output head and loss, sum(token_weights * cross_entropy(hidden weight^T, labels)).

The [T, V] logits are never held at once. The gradients are computed in forward, one chunk of tokens
at a time, while the chunk's logits exist: three matmuls in all, where a recomputing backward needs
four. The softmax overwrites the logits, a few rows at a time in fp32. The weight's gradient is
summed over the chunks in fp32, one slice of the vocabulary at a time, so that no second [V, D] is
needed. Source: Wijmans et al. 2024, Cut Your Losses, arXiv:2411.09009; gradients in forward: Liger
Kernel, arXiv:2410.10989.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.native import working_dtype

CHUNK_LOGITS = 1 << 27  # logits of one chunk: 256 MB in bf16
ROW_MULTIPLE = 32  # the last chunk is padded to a multiple of this many rows, so that few shapes occur
SOFTMAX_ROWS = 16  # rows of one softmax on a CPU: 16 MB in fp32 for a vocabulary of 250,000
VOCABULARY_SLICE = 4096  # rows of the weight's gradient that are computed at once


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, label_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [T, D], weight [V, D], labels [T] int64 (-100: no label), token_weights [T] fp32.

    label_rows [N] int64: indices of the tokens with a label. If None they are looked up here, which
    costs a host sync. Returns (loss, token_loss): loss is an fp32 scalar, differentiable in hidden
    and weight; token_loss [T] is fp32, detached and 0 without a label. Tokens without a label cost
    nothing.
    """
    if label_rows is None:
        label_rows = (labels != -100).nonzero().squeeze(1)
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, label_rows, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        label_rows: Tensor,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = working_dtype(hidden)
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        token_loss = torch.zeros(labels.shape, dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        allocate = torch.empty if len(label_rows) else torch.zeros  # the first chunk writes, the others add
        grad_weight = allocate(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        for number, (rows, is_real) in enumerate(chunks(label_rows, weight.shape[0])):
            h, target, real = hidden[rows], labels[rows, None], is_real[:, None].to(wide)
            logits = h @ weight.T  # [c, V]
            scale = token_weights[rows, None].to(wide) * real
            losses = _loss(logits, target, scale, overwrite=need_hidden or need_weight)
            token_loss.index_add_(0, rows, (losses * real).squeeze(1))
            if grad_hidden is not None:
                grad_hidden.index_add_(0, rows, logits @ weight)
            if grad_weight is not None:
                _weight_gradient(grad_weight, logits, h, add=number > 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(token_loss)
        return (token_loss * token_weights.to(wide)).sum(), token_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_loss).to(grad_hidden.dtype)
        if grad_weight is not None:
            scaled = torch.empty(grad_weight.shape, dtype=ctx.dtype, device=grad_weight.device)
            for part, out in zip(grad_weight.split(VOCABULARY_SLICE), scaled.split(VOCABULARY_SLICE), strict=True):
                out.copy_(part * grad_loss)
            grad_weight = scaled
        return grad_hidden, grad_weight, None, None, None, None


def chunks(label_rows: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """The rows [c] of each chunk, and a mask [c] that is False for the last chunk's padding."""
    size = max(16, CHUNK_LOGITS // vocabulary)
    size -= size % ROW_MULTIPLE if size > ROW_MULTIPLE else 0
    padding = -len(label_rows) % min(size, ROW_MULTIPLE)
    rows = torch.cat([label_rows, label_rows[:1].expand(padding)])
    is_real = torch.arange(len(rows), device=rows.device) < len(label_rows)
    return list(zip(rows.split(size), is_real.split(size), strict=True)) if len(rows) else []


def _loss(logits: Tensor, target: Tensor, scale: Tensor, overwrite: bool) -> Tensor:
    """logits [c, V], target [c, 1], scale [c, 1] -> losses [c, 1].

    If `overwrite`, the logits become their gradient, scale * (softmax - 1 at the target).
    """
    wide = working_dtype(logits)
    size = SOFTMAX_ROWS if logits.is_cpu else len(logits)
    buffers = [torch.empty(min(size, len(logits)), logits.shape[1], dtype=wide, device=logits.device) for _ in range(2)]
    losses = []
    for part, part_target, part_scale in zip(logits.split(size), target.split(size), scale.split(size), strict=True):
        x, p = (buffer[: len(part)] for buffer in buffers)
        torch.softmax(x.copy_(part), -1, out=p)
        log_sum = x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        losses.append(log_sum - x.gather(1, part_target))
        if overwrite:
            p.scatter_add_(1, part_target, torch.full_like(part_scale, -1))
            part.copy_(p.mul_(part_scale))
    return torch.cat(losses)


def _weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor, add: bool) -> None:
    """Writes grad^T hidden into total [V, D], or adds it; grad [c, V], hidden [c, D]."""
    for columns, part in zip(grad.split(VOCABULARY_SLICE, dim=1), total.split(VOCABULARY_SLICE), strict=True):
        product = columns.T @ hidden
        if add:
            part.add_(product)
        else:
            part.copy_(product)
