"""AdamW over local shards of parameters; whether a group skips a step is decided on the device."""

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen35.device import CopyQueue, host_buffer

ROLLBACK_ELEMENTS = 1 << 21  # updated at a time where a skip may undo the update; their copy takes 25 MB
CHUNK_ELEMENTS = 1 << 25  # the two moments of a chunk take 256 MB; two chunks are on the device
ALIGNMENT = 64  # tensors are split at multiples of it, so that parts use the same vector instructions


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
            if trained := self.begin(group):
                states = [self.state[p] for p in trained]
                first, second = ([local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq"))
                grads = [local(p.grad) for p in trained if p.grad is not None]
                update(group, [local(p) for p in trained], grads, first, second, [s["step"] for s in states])

    def begin(self, group: dict[str, Any]) -> list[nn.Parameter]:
        """The group's parameters that have gradients. Creates missing state and counts the step."""
        trained = [p for p in group["params"] if p.grad is not None]
        for p in trained:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = self.zeros_like(p), self.zeros_like(p)
        if trained:
            counted = 1 if group["skip"] is None else [1 - group["skip"].float()] * len(trained)
            torch._foreach_add_([self.state[p]["step"] for p in trained], counted)
        return trained

    def zeros_like(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter, requires_grad=False)


class SwappedAdamW(AdamW):
    """AdamW with its moments in pinned host memory: the same bits, and the same checkpoints.

    They are brought to the device chunk by chunk in each step. While one chunk is updated, its
    neighbours' moments are copied, so that the device holds those of two chunks.
    """

    def __init__(self, groups: list[dict[str, Any]], chunk: int = CHUNK_ELEMENTS, **options: Any):
        """chunk: elements whose moments are copied at a time, at least ALIGNMENT."""
        super().__init__(groups, **options)
        self.chunk = chunk
        for group in self.param_groups:
            group["on_host"] = True  # tells the checkpoint loader where moments go
        device = self.param_groups[0]["params"][0].device
        self._to_device, self._to_host = CopyQueue(device), CopyQueue(device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Does not block: whoever reads the moments synchronizes first (checkpoint/dcp.py does)."""
        assert closure is None
        chunks = [(group, chunk) for group in self.param_groups for chunk in self._chunks(self.begin(group))]
        if not chunks:
            return
        count, sizes = min(2, len(chunks)), [sum(len(piece[0]) for piece in chunk) for _, chunk in chunks]
        buffers = torch.empty(count, 2, max(sizes), device=chunks[0][1][0][0].device)
        self._to_device.wait_for_device()  # queued kernels may still use the memory of these buffers
        copied_back = [self._to_host.record_event()] * count  # a buffer is free once its moments are on the host again
        for i, ((group, chunk), size) in enumerate(zip(chunks, sizes, strict=True)):
            parameters, grads, *on_host, steps = (list(tensors) for tensors in zip(*chunk, strict=True))
            lengths = [len(p) for p in parameters]
            first, second = (list(moments.split(lengths)) for moments in buffers[i % count, :, :size])
            with self._to_device.behind(copied_back[i % count]):
                _copy([first, second], on_host)
            self._to_device.make_device_wait(self._to_device.record_event())
            update(group, parameters, grads, first, second, steps)
            self._to_host.wait_for_device()
            with self._to_host.behind(None):
                _copy(on_host, [first, second])
            copied_back[i % count] = self._to_host.record_event()
        self._to_host.make_device_wait(self._to_host.record_event())  # before the buffers are freed

    def zeros_like(self, parameter: nn.Parameter) -> Tensor:
        return host_buffer(parameter)

    def _chunks(self, trained: list[nn.Parameter]) -> Iterator[list[tuple[Tensor, ...]]]:
        """Lists of pieces that are updated together: parameter, gradient, moments (flat), step."""
        chunk: list[tuple[Tensor, ...]] = []
        room = self.chunk
        for p in trained:
            state = self.state[p]
            assert p.grad is not None
            first, second = (local(state[name]).view(-1) for name in ("exp_avg", "exp_avg_sq"))
            flat = local(p).view(-1), local(p.grad).reshape(-1), first, second
            left = len(flat[0])
            while left:
                size = left if left <= room else room - room % ALIGNMENT
                if size:
                    begin = len(flat[0]) - left
                    chunk.append((*(x[begin : begin + size] for x in flat), state["step"]))
                    left, room = left - size, room - size
                else:
                    yield chunk
                    chunk, room = [], self.chunk
        if chunk:
            yield chunk


def _copy(targets: list[list[Tensor]], sources: list[list[Tensor]]) -> None:
    for target, source in zip(chain(*targets), chain(*sources), strict=True):
        target.copy_(source, non_blocking=True)


def update(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
) -> None:
    """The arithmetic of one step, in place, undone if the group is skipped."""
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


@torch.no_grad()  # else a DTensor makes a view of its shard, an operator for each parameter
def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
