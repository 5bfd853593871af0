"""AdamW with its moments in pinned host memory, brought to the device chunk by chunk in each step.

While one chunk is updated, its neighbours' moments are copied. Arithmetic and state are those of
torch's fused AdamW: the same numbers bit for bit, and each loads the other's checkpoints.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwen35.device import CopyQueue, host_buffer
from qwen35.training.adamw import AdamW, local, update

CHUNK_ELEMENTS = 1 << 25  # the two moments of a chunk take 256 MB; two chunks are on the device
ALIGNMENT = 64  # tensors are split at multiples of it, so that parts use the same vector instructions


@dataclass
class Chunk:
    """Parts of parameters that are updated together, as flat views."""

    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # first and second, on the host
    steps: list[Tensor] = field(default_factory=list)
    size: int = 0


class SwappedAdamW(AdamW):
    """chunk: elements whose moments are copied at a time; the device holds two chunks."""

    def __init__(self, groups: list[dict[str, Any]], chunk: int = CHUNK_ELEMENTS, **options: Any):
        assert chunk >= ALIGNMENT
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
        trained = [self.begin(group) for group in self.param_groups]
        groups = list(zip(self.param_groups, trained, strict=True))
        chunks = [(group, chunk) for group, parameters in groups for chunk in self._chunks(parameters)]
        if chunks:
            self._update(chunks)
        for group, parameters in groups:
            self.end(group, parameters)

    def _update(self, chunks: list[tuple[dict[str, Any], Chunk]]) -> None:
        count = min(2, len(chunks))
        device = chunks[0][1].parameters[0].device
        buffers = torch.empty(count, 2, max(chunk.size for _, chunk in chunks), device=device)
        self._to_device.wait_for_device()  # queued kernels may still use the memory of these buffers
        copied_back = [self._to_host.record_event()] * count  # a buffer is free once its moments are on the host again
        for i, (group, chunk) in enumerate(chunks):
            buffer = buffers[i % count]
            first, second = (list(x.split([len(p) for p in chunk.parameters])) for x in buffer[:, : chunk.size])
            with self._to_device.behind(copied_back[i % count]):
                _copy(chunk.moments, first, second, to_device=True)
            self._to_device.make_device_wait(self._to_device.record_event())
            update(group, chunk.parameters, chunk.gradients, first, second, chunk.steps)
            self._to_host.wait_for_device()
            with self._to_host.behind(None):
                _copy(chunk.moments, first, second, to_device=False)
            copied_back[i % count] = self._to_host.record_event()
        self._to_host.make_device_wait(self._to_host.record_event())  # before the buffers are freed

    def zeros_like(self, parameter: nn.Parameter) -> Tensor:
        return host_buffer(parameter)

    def _chunks(self, trained: list[nn.Parameter]) -> Iterator[Chunk]:
        """Cut the parameters into chunks, in order."""
        chunk = Chunk()
        for parameter in trained:
            state = self.state[parameter]
            changed = (local(x).view(-1) for x in (parameter, state["exp_avg"], state["exp_avg_sq"]))
            assert parameter.grad is not None
            flat = local(parameter.grad).reshape(-1), *changed
            done, total = 0, len(flat[0])
            while done < total:
                size = min(total - done, self.chunk - chunk.size)
                size -= size % ALIGNMENT if done + size < total else 0
                if size <= 0:
                    yield chunk
                    chunk = Chunk()
                    continue
                grad, p, first, second = (x[done : done + size] for x in flat)
                chunk.parameters.append(p)
                chunk.gradients.append(grad)
                chunk.moments.append((first, second))
                chunk.steps.append(state["step"])
                chunk.size += size
                done += size
        if chunk.size:
            yield chunk


def _copy(moments: list[tuple[Tensor, Tensor]], first: list[Tensor], second: list[Tensor], to_device: bool) -> None:
    for host_pair, *device_pair in zip(moments, first, second, strict=True):
        for on_host, on_device in zip(host_pair, device_pair, strict=True):
            target, source = (on_device, on_host) if to_device else (on_host, on_device)
            target.copy_(source, non_blocking=True)
