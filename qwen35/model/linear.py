"""Linear maps of something that is cheaper to make again than to keep."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def recomputed_linear(make: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> Tensor:
    """make(*inputs) [T, A], weight [B, A] -> make(*inputs) weight^T [T, B]. For backward the inputs alone are kept."""
    return recomputed_linears(make, [weight], *inputs)[0]


def recomputed_linears(
    make: Callable[..., Tensor] | None, weights: Sequence[Tensor], *inputs: Tensor
) -> tuple[Tensor, ...]:
    """The same through several weights, which share what is made, in backward too. `make` None: of the one input itself."""
    return _LinearsOf.apply(make, len(weights), *weights, *inputs)


class _LinearsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor] | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.make, ctx.count = make, count
        ctx.save_for_backward(*tensors)
        made = make(*tensors[count:]) if make else tensors[count]
        return tuple(made @ weight.T for weight in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weights, inputs = saved[: ctx.count], saved[ctx.count :]
        needs_weights, needs = ctx.needs_input_grad[2 : 2 + ctx.count], ctx.needs_input_grad[2 + ctx.count :]
        made, leaves = inputs[0], [x for x, need in zip(inputs, needs, strict=True) if need]
        if ctx.make:
            inputs = [x.detach().requires_grad_() if need else x for x, need in zip(inputs, needs, strict=True)]
            leaves = [x for x, need in zip(inputs, needs, strict=True) if need]
            with torch.enable_grad():
                made = ctx.make(*inputs)
        grad_weights = [grad.T @ made if need else None for grad, need in zip(grads, needs_weights, strict=True)]
        found: Iterator[Tensor] = iter(())
        if leaves:
            grad_made = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_made.addmm_(grad, weight)
            found = iter(torch.autograd.grad(made, leaves, grad_made) if ctx.make else [grad_made])
        return None, None, *grad_weights, *(next(found) if need else None for need in needs)
