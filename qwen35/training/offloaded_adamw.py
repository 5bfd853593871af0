"""AdamW whose two moments live in the host's memory, page-locked: a step brings them to the device chunk by chunk.

The copies of one chunk's moments, there and back, run beside the arithmetic of its neighbours. The arithmetic is torch's own
fused AdamW, the state is that of torch.optim.AdamW: the same numbers to the bit, and checkpoints that either of them loads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwen35.device import CopyQueue, host_buffer
from qwen35.training.adamw import AdamW, local, update

CHUNK_ELEMENTS = 1 << 25  # elements: both moments take 256 MB on the device, of two chunks at a time
ALIGNMENT = (
    64  # elements: where a tensor is cut, so that each part goes through the same vector instructions as the whole
)


@dataclass
class Chunk:
    """Parts of parameters that are updated together: flat views of the parameter, its gradient and its moments."""

    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # on the host
    steps: list[Tensor] = field(default_factory=list)
    size: int = 0


class SwappedAdamW(AdamW):
    """chunk: elements whose moments are on the device at a time (twice as many in all: one comes while one is used)."""

    def __init__(self, groups: list[dict[str, Any]], chunk: int = CHUNK_ELEMENTS, **options: Any):
        assert chunk >= ALIGNMENT
        super().__init__(groups, **options)
        self.chunk = chunk
        for group in self.param_groups:
            group["on_host"] = True  # where the checkpoint puts the moments that it reads
        device = self.param_groups[0]["params"][0].device
        self._coming, self._going = CopyQueue(device), CopyQueue(device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Nothing waits on the host: who reads the moments there waits for the device first (checkpoint/dcp.py does)."""
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
        rooms = torch.empty(count, 2, max(chunk.size for _, chunk in chunks), device=device)
        self._coming.follow_device()  # the rooms' memory may have served what the device has yet to do
        left = [self._going.mark()] * count  # that the moments which used a room last are back on the host
        for i, (group, chunk) in enumerate(chunks):
            room = rooms[i % count]
            first, second = (list(x.split([len(p) for p in chunk.parameters])) for x in room[:, : chunk.size])
            with self._coming.after(left[i % count]):
                _copy(chunk.moments, first, second, to_device=True)
            self._coming.hold_device(self._coming.mark())
            update(group, chunk.parameters, chunk.gradients, first, second, chunk.steps)
            self._going.follow_device()
            with self._going.after(None):
                _copy(chunk.moments, first, second, to_device=False)
            left[i % count] = self._going.mark()
        self._going.hold_device(self._going.mark())  # the rooms are given back

    def zeros_like(self, parameter: nn.Parameter) -> Tensor:
        return host_buffer(parameter)

    def _chunks(self, trained: list[nn.Parameter]) -> Iterator[Chunk]:
        """In the order of the parameters."""
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
    for pair, *places in zip(moments, first, second, strict=True):
        for there, place in zip(pair, places, strict=True):
            target, source = (place, there) if to_device else (there, place)
            target.copy_(source, non_blocking=True)
