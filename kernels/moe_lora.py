"""Low-rank adapters of the routed experts: each expert multiplies by W + scale * B A instead of W.

That sum is never made: the rows pass through A and B beside W, by the grouped matmuls of moe.py.
Backward gets nothing more to keep: what has the rank's width is computed again from gate_up.
Source: Hu et al. 2021, LoRA, arXiv:2106.09685.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor


@dataclass(frozen=True)
class ExpertAdapters:
    """A and B of the projections that have adapters, of the weights' experts and in their dtype."""

    scale: float
    gate_up: tuple[Tensor, Tensor] | None = None  # A [E, r, H], B [E, 2I, r]
    down: tuple[Tensor, Tensor] | None = None  # A [E, r, I], B [E, H, r]


def stacks(gate_up_proj: Tensor, down_proj: Tensor, adapters: ExpertAdapters | None) -> tuple[Tensor | None, ...]:
    """W, A and B of gate_up, then those of down: what the experts' autograd.Functions take last."""
    gate_up, down = (adapters.gate_up, adapters.down) if adapters else (None, None)
    return gate_up_proj, *(gate_up or (None, None)), down_proj, *(down or (None, None))


def projections(
    ops: ModuleType, ends: Tensor, scale: float, stacks: Sequence[Tensor]
) -> tuple["Projection", "Projection"]:
    """gate_up's and down's, from `stacks`; ends [E]: where each expert's rows end."""
    gate_up, gate_up_a, gate_up_b, down, down_a, down_b = stacks
    return (
        Projection(ops, ends, scale, gate_up, gate_up_a, gate_up_b),
        Projection(ops, ends, scale, down, down_a, down_b),
    )


@dataclass(frozen=True)
class Projection:
    """One projection of all experts, and its adapter if it has one.

    "low" is the gradient of A's products, times the scale: [N, r], None without an adapter.
    """

    ops: ModuleType
    ends: Tensor
    scale: float
    weight: Tensor  # [E, out, in]
    a: Tensor | None  # [E, r, in]
    b: Tensor | None  # [E, out, r]

    def forward(self, rows: Tensor) -> Tensor:
        """rows [N, in] by expert -> [N, out]"""
        return self.add(self.ops.grouped_matmul(rows, self.weight.mT, self.ends), rows)

    def add(self, out: Tensor, rows: Tensor) -> Tensor:
        """Adds the adapter's part to `out`, W's products with rows."""
        if self.a is None or self.b is None:
            return out
        product = self.ops.grouped_matmul(rows, self.a.mT, self.ends)
        return out.add_(self.ops.grouped_matmul(product, self.b.mT, self.ends), alpha=self.scale)

    def low(self, grad: Tensor) -> Tensor | None:
        """grad [N, out], of the projection's output."""
        return None if self.b is None else self.ops.grouped_matmul(grad, self.b, self.ends).mul_(self.scale)

    def backward(self, grad: Tensor, low: Tensor | None) -> Tensor:
        """grad [N, out] and its low -> the gradient of the rows [N, in]"""
        return self.add_backward(self.ops.grouped_matmul(grad, self.weight, self.ends), low)

    def add_backward(self, grad_rows: Tensor, low: Tensor | None) -> Tensor:
        """Adds the adapter's part to grad_rows, that of W."""
        return grad_rows if low is None else grad_rows.add_(self.ops.grouped_matmul(low, self.a, self.ends))

    def gradients(
        self, needed: Sequence[bool], rows: Tensor | None, grad: Tensor, low: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Those of W, A and B, None where not needed; without any, rows may be None.

        Either rows or grad and low are multiplied by the routing weights.
        """
        of_weight, of_a, of_b = needed
        ops, ends = self.ops, self.ends
        grad_weight = ops.grouped_weight_grad(grad, rows, ends) if of_weight else None
        grad_a = ops.grouped_weight_grad(low, rows, ends) if of_a else None
        if not of_b or self.a is None:
            return grad_weight, grad_a, None
        product = ops.grouped_matmul(rows, self.a.mT, ends).mul_(self.scale)
        return grad_weight, grad_a, ops.grouped_weight_grad(grad, product, ends)
