"""Linear maps of inputs that are cheaper to compute again in backward than to save.

A map may carry an adapter of low rank: y = x W^T + s (x A^T) B^T, with W frozen. Maps that share
their input share one matmul for all their A. Only the low-rank products are saved beside the
inputs, and no merged weight is ever made. Source: Hu et al. 2021, LoRA, arXiv:2106.09685.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """A frozen linear map with an adapter. Its values are undefined until they are loaded."""

    def __init__(self, frozen: nn.Linear, r: int, scale: float):
        super().__init__(frozen.in_features, frozen.out_features, bias=False, device="meta")
        self.weight, self.bias = frozen.weight, frozen.bias
        empty = partial(torch.empty, dtype=torch.float32, device=frozen.weight.device)
        self.lora_A = nn.Parameter(empty(r, frozen.in_features))
        self.lora_B = nn.Parameter(empty(frozen.out_features, r))
        self.scale = scale  # 0: without the adapter

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear. autograd saves x and x A^T."""
        y = super().forward(x)
        return torch.addmm(y, x @ self.lora_A.T, self.lora_B.T, alpha=self.scale) if self.scale else y


def recomputed_linear(make: Callable[..., Tensor], projection: nn.Linear | Tensor, *inputs: Tensor) -> Tensor:
    """make(*inputs) [T, A] -> [T, B], by a module's weight or a weight [B, A]; saves the inputs."""
    return recomputed_linears(make, [projection], *inputs)[0]


def recomputed_linears(
    make: Callable[..., Tensor] | None, projections: Sequence[nn.Linear | Tensor], *inputs: Tensor
) -> tuple[Tensor, ...]:
    """As recomputed_linear for projections that share one `make`. None: of the one input itself."""
    weights = [p if isinstance(p, Tensor) else p.weight for p in projections]
    adapted = [(i, p) for i, p in enumerate(projections) if isinstance(p, LoraLinear) and p.scale]
    adapters = [*(p.lora_A for _, p in adapted), *(p.lora_B for _, p in adapted)]
    scale = adapted[0][1].scale if adapted else 0.0  # one for the whole model
    return _Linears.apply(make, len(weights), [i for i, _ in adapted], scale, *weights, *adapters, *inputs)


class _Linears(torch.autograd.Function):
    """adapted: the indices of the weights that have adapters, whose A come first, then their B."""

    @staticmethod
    def forward(
        ctx: Any, make: Callable[..., Tensor] | None, count: int, adapted: list[int], scale: float, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, downs, ups, inputs = _split(tensors, count, len(adapted))
        result = make(*inputs) if make else inputs[0]
        outputs, low = [result @ weight.T for weight in weights], tuple[Tensor, ...]()
        if adapted:
            low = (result @ torch.cat(downs).T).mul_(scale).split([len(a) for a in downs], dim=1)
        for i, x, b in zip(adapted, low, ups, strict=True):
            outputs[i].addmm_(x, b.T)
        ctx.make, ctx.count, ctx.adapted, ctx.scale = make, count, adapted, scale
        ctx.save_for_backward(*tensors, *low)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        adapted = ctx.adapted
        weights, downs, ups, others = _split(ctx.saved_tensors, ctx.count, len(adapted))
        inputs, low = others[: len(others) - len(adapted)], others[len(others) - len(adapted) :]
        needs_weights, needs_downs, needs_ups, needs = _split(ctx.needs_input_grad[4:], ctx.count, len(adapted))
        result, leaves = inputs[0], [x for x, need in zip(inputs, needs, strict=True) if need]
        if ctx.make:
            inputs = tuple(x.detach().requires_grad_() if need else x for x, need in zip(inputs, needs, strict=True))
            leaves = [x for x, need in zip(inputs, needs, strict=True) if need]
            with torch.enable_grad():
                result = ctx.make(*inputs)
        grad_weights = [grad.T @ result if need else None for grad, need in zip(grads, needs_weights, strict=True)]
        grad_ups = [grads[i].T @ x if need else None for i, x, need in zip(adapted, low, needs_ups, strict=True)]
        grad_downs: Sequence[Tensor | None] = [None] * len(adapted)
        if adapted and (leaves or any(needs_downs)):
            grad_low = torch.cat([grads[i] @ b for i, b in zip(adapted, ups, strict=True)], dim=1).mul_(ctx.scale)
            if any(needs_downs):
                grad_downs = (grad_low.T @ result).split([len(a) for a in downs])
        input_grads: Iterator[Tensor] = iter(())
        if leaves:
            grad_made = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_made.addmm_(grad, weight)
            if adapted:
                grad_made.addmm_(grad_low, torch.cat(downs))
            input_grads = iter(torch.autograd.grad(result, leaves, grad_made) if ctx.make else [grad_made])
        grad_inputs = [next(input_grads) if need else None for need in needs]
        return None, None, None, None, *grad_weights, *grad_downs, *grad_ups, *grad_inputs


def _split(values: tuple[Any, ...], weights: int, adapters: int) -> tuple[tuple[Any, ...], ...]:
    """What belongs to the weights, to the adapters' A and B, and to the inputs."""
    ends = weights, weights + adapters, weights + 2 * adapters
    return values[: ends[0]], values[ends[0] : ends[1]], values[ends[1] : ends[2]], values[ends[2] :]
