"""The head and its loss in one: loss = sum(token_weights * cross_entropy(hidden weight^T, labels)), never holding [T, V].

The gradients are made in forward, chunk by chunk of tokens, while the chunk's logits are there: three matmuls in all, where a
recomputing backward needs four. The softmax takes the place of the logits, a few rows at a time in fp32; the weight's
gradient is summed over the chunks in fp32, slice by slice of the vocabulary, so that no other [V, D] is needed.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.native import working_dtype

CHUNK_LOGITS = 1 << 27  # logits of one chunk: 256 MB in bf16
STEP = 32  # the last chunk is filled up to a multiple of this many rows: few shapes
SOFTMAX_ROWS = 16  # 16 MB in fp32 for 250,000 words
SLICE = 4096  # words of the weight's gradient that are added at once


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, trained: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [T, D], weight [V, D], labels [T] int64 (-100: not trained), token_weights [T] fp32; trained [N] int64: the rows
    with a label, made by the host (PackedBatch.label_positions), else looked up here, for which a device waits.

    Returns (loss, token_loss): loss fp32 scalar, differentiable in hidden and weight; token_loss [T] fp32, detached, 0 where
    not trained. Tokens that are not trained cost nothing.
    """
    if trained is None:
        trained = (labels != -100).nonzero().squeeze(1)
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, trained, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        trained: Tensor,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = working_dtype(hidden)
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        token_loss = torch.zeros(labels.shape, dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        make = torch.empty if len(trained) else torch.zeros  # the first chunk writes, the others add
        grad_weight = make(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        for number, (rows, is_real) in enumerate(chunks(trained, weight.shape[0])):
            h, target, real = hidden[rows], labels[rows, None], is_real[:, None].to(wide)
            logits = h @ weight.T  # [c, V]
            scale = token_weights[rows, None].to(wide) * real
            losses = _loss(logits, target, scale, into_gradient=need_hidden or need_weight)
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
            for some, out in zip(grad_weight.split(SLICE), scaled.split(SLICE), strict=True):
                out.copy_(some * grad_loss)
            grad_weight = scaled
        return grad_hidden, grad_weight, None, None, None, None


def chunks(trained: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of each chunk [c], and whether they count: the last chunk is filled up with one row again and again."""
    size = max(16, CHUNK_LOGITS // vocabulary)
    size -= size % STEP if size > STEP else 0
    fill = -len(trained) % min(size, STEP)
    rows = torch.cat([trained, trained[:1].expand(fill)])
    is_real = torch.arange(len(rows), device=rows.device) < len(trained)
    return list(zip(rows.split(size), is_real.split(size), strict=True)) if len(rows) else []


def _loss(logits: Tensor, target: Tensor, scale: Tensor, into_gradient: bool) -> Tensor:
    """logits [c, V], target, scale [c, 1] -> losses [c, 1]; the logits become scale * (softmax - 1 at the target)."""
    wide = working_dtype(logits)
    size = SOFTMAX_ROWS if logits.is_cpu else len(logits)
    buffers = [torch.empty(min(size, len(logits)), logits.shape[1], dtype=wide, device=logits.device) for _ in range(2)]
    losses = []
    for some, of_row, by in zip(logits.split(size), target.split(size), scale.split(size), strict=True):
        x, p = (buffer[: len(some)] for buffer in buffers)
        torch.softmax(x.copy_(some), -1, out=p)
        log_sum = x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        losses.append(log_sum - x.gather(1, of_row))
        if into_gradient:
            p.scatter_add_(1, of_row, torch.full_like(by, -1))
            some.copy_(p.mul_(by))
    return torch.cat(losses)


def _weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor, add: bool) -> None:
    """total [V, D] becomes grad^T hidden, or that more; grad [c, V], hidden [c, D]."""
    for words, some in zip(grad.split(SLICE, dim=1), total.split(SLICE), strict=True):
        product = words.T @ hidden
        if add:
            some.add_(product)
        else:
            some.copy_(product)
