"""The head and its loss in one: loss = sum(token_weights * cross_entropy(hidden weight^T, labels)), never holding [T, V].

The gradients are made in forward, chunk by chunk of tokens, while the chunk's logits are there: three matmuls in all, where a
recomputing backward needs four.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 25  # logits of one chunk: 128 MB in fp32


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """hidden [T, D], weight [V, D], labels [T] int64 (-100: not trained), token_weights [T] fp32.

    Returns (loss, token_loss): loss fp32 scalar, differentiable in hidden and weight; token_loss [T] fp32, detached, 0 where
    not trained. Tokens that are not trained cost nothing.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        trained = (labels != -100).nonzero().squeeze(1)
        token_loss = torch.zeros(labels.shape, dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for rows in trained.split(max(16, CHUNK_LOGITS // weight.shape[0])):
            h, target, scale = hidden[rows], labels[rows, None], token_weights[rows, None].to(wide)
            logits = (h @ weight.T).to(wide)  # [c, V]
            log_sum = logits.logsumexp(-1, keepdim=True)
            losses = log_sum - logits.gather(1, target)
            token_loss[rows] = losses.squeeze(1)
            loss += (losses * scale).sum()
            if need_hidden or need_weight:
                grad = logits.sub_(log_sum).exp_().mul_(scale)  # softmax, times the token's weight …
                grad.scatter_add_(1, target, -scale)  # … minus the same at the target
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ weight
                if grad_weight is not None:
                    grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(token_loss)
        return loss, token_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_loss).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
