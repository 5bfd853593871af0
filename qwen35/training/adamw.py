"""AdamW over local shards of parameters; whether a group skips a step is decided on the device."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ROLLBACK_ELEMENTS = 1 << 21  # updated at a time where a skip may undo the update; their copy takes 25 MB


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, bit for bit, with the same state.

    A group's "skip" is None or a bool scalar on the device. Where it is true, the parameters,
    moments and step counters stay as they are, as if there were no gradients. torch's own flag for
    that, found_inf, does nothing on an NPU, whose _fused_adamw_ never reads it; so the update is
    undone.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        super().__init__(groups, fused=True, **options)
        for group in self.param_groups:
            group.setdefault("skip", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            trained = self.begin(group)
            if not trained:
                continue
            states = [self.state[p] for p in trained]
            first, second = ([local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq"))
            grads = [local(p.grad) for p in trained if p.grad is not None]
            update(group, [local(p) for p in trained], grads, first, second, [s["step"] for s in states])
            self.end(group, trained)

    def begin(self, group: dict[str, Any]) -> list[nn.Parameter]:
        """The group's parameters that have gradients. Creates missing state and counts the step."""
        trained = [p for p in group["params"] if p.grad is not None]
        for p in trained:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = self.zeros_like(p), self.zeros_like(p)
        if trained:
            torch._foreach_add_([self.state[p]["step"] for p in trained], 1)
        return trained

    def end(self, group: dict[str, Any], trained: list[nn.Parameter]) -> None:
        if trained and group["skip"] is not None:
            torch._foreach_sub_([self.state[p]["step"] for p in trained], [group["skip"].float()] * len(trained))

    def zeros_like(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter, requires_grad=False)


def update(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
) -> None:
    """The arithmetic of one step, in place, undone if the group is skipped (but for `steps`)."""
    skip = group["skip"]
    for part in [slice(None)] if skip is None else _parts(parameters):
        changed = [*parameters[part], *first[part], *second[part]]
        before = None if skip is None else torch.cat([x.flatten() for x in changed])
        torch._fused_adamw_(
            parameters[part], grads[part], first[part], second[part], [], steps[part], lr=group["lr"],
            beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip
        if before is not None:
            chosen = torch.where(skip, before, torch.cat([x.flatten() for x in changed]))
            rows = chosen.split([x.numel() for x in changed])
            torch._foreach_copy_(changed, [row.view_as(x) for row, x in zip(rows, changed, strict=True)])


def _parts(tensors: list[Tensor]) -> list[slice]:
    """Slices of neighbouring tensors, of at most ROLLBACK_ELEMENTS elements or one tensor each."""
    starts, size = [0], 0
    for i, tensor in enumerate(tensors):
        if size and size + tensor.numel() > ROLLBACK_ELEMENTS:
            starts.append(i)
            size = 0
        size += tensor.numel()
    return [slice(*ends) for ends in pairwise([*starts, len(tensors)])]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
