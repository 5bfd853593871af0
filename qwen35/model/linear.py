"""A linear map of something that is cheaper to make again than to keep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def linear_of(make: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> Tensor:
    """make(*inputs) [T, A], weight [B, A] -> make(*inputs) weight^T [T, B]. For backward the inputs alone are kept."""
    return _LinearOf.apply(make, weight, *inputs)


class _LinearOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(weight, *inputs)
        return make(*inputs) @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        _, need_weight, *needs = ctx.needs_input_grad
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        with torch.enable_grad():
            made = ctx.make(*leaves)
        grad_weight = grad.T @ made.detach() if need_weight else None
        grads: list[Tensor | None] = [None] * len(leaves)
        if any(needs):
            found = iter(torch.autograd.grad(made, [x for x in leaves if x.requires_grad], grad @ weight))
            grads = [next(found) if need else None for need in needs]
        return None, grad_weight, *grads
