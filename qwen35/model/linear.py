"""Linear maps of inputs that are cheaper to compute again in backward than to save."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def recomputed_linear(make: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> Tensor:
    """make(*inputs) [T, A], weight [B, A] -> make(*inputs) weight^T [T, B]; saves the inputs."""
    return recomputed_linears(make, [weight], *inputs)[0]


def recomputed_linears(
    make: Callable[..., Tensor] | None, weights: Sequence[Tensor], *inputs: Tensor
) -> tuple[Tensor, ...]:
    """As recomputed_linear for weights that share one `make`. None: of the one input itself."""
    return _LinearsOf.apply(make, len(weights), *weights, *inputs)


class _LinearsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor] | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.make, ctx.count = make, count
        ctx.save_for_backward(*tensors)
        result = make(*tensors[count:]) if make else tensors[count]
        return tuple(result @ weight.T for weight in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weights, inputs = saved[: ctx.count], saved[ctx.count :]
        needs_weights, needs = ctx.needs_input_grad[2 : 2 + ctx.count], ctx.needs_input_grad[2 + ctx.count :]
        result, leaves = inputs[0], [x for x, need in zip(inputs, needs, strict=True) if need]
        if ctx.make:
            inputs = [x.detach().requires_grad_() if need else x for x, need in zip(inputs, needs, strict=True)]
            leaves = [x for x, need in zip(inputs, needs, strict=True) if need]
            with torch.enable_grad():
                result = ctx.make(*inputs)
        grad_weights = [grad.T @ result if need else None for grad, need in zip(grads, needs_weights, strict=True)]
        input_grads: Iterator[Tensor] = iter(())
        if leaves:
            grad_made = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_made.addmm_(grad, weight)
            input_grads = iter(torch.autograd.grad(result, leaves, grad_made) if ctx.make else [grad_made])
        return None, None, *grad_weights, *(next(input_grads) if need else None for need in needs)
