"""Hands a batch from a worker to the training process in one block of shared memory.

Each tensor that goes through a queue by itself costs both processes a file descriptor and a round
trip, a third of a millisecond, and a batch has a dozen tensors.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen35.batch import PackedBatch, map_fields
from qwen35.errors import SettingError

ALIGN = 64  # bytes: a cache line, and aligned for every dtype


@dataclass(frozen=True)
class MemorySlice:
    """Where a tensor lies in the shared memory; stands in for it while the batch is pickled."""

    start: int  # bytes
    shape: torch.Size
    dtype: torch.dtype


def shared_memory(size: int) -> Tensor:
    """[size] uint8. Raises SettingError if /dev/shm is full: containers get 64 MB by default."""
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise SettingError(
            f"/dev/shm has no room for {size:,} bytes of a batch; start the container with --shm-size=16g or --ipc=host, or "
            "set data.dataloader_param.num_workers: 0"
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class SharedBatch:
    """A PackedBatch in shared memory; it unpickles as a PackedBatch of views of that memory."""

    def __init__(self, batch: PackedBatch):
        tensors: list[tuple[MemorySlice, Tensor]] = []
        size = 0

        def reserve(tensor: Tensor) -> MemorySlice:
            nonlocal size
            tensors.append((MemorySlice(size, tensor.shape, tensor.dtype), tensor))
            size += math.ceil(tensor.nbytes / ALIGN) * ALIGN
            return tensors[-1][0]

        self.outline = map_fields(batch, reserve)
        self.memory = shared_memory(size)
        for part, tensor in tensors:
            view(self.memory, part).copy_(tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        return unpack, (self.outline, self.memory)


def unpack(outline: PackedBatch, memory: Tensor) -> PackedBatch:
    return map_fields(outline, lambda part: view(memory, part), kind=MemorySlice)


def view(memory: Tensor, part: MemorySlice) -> Tensor:
    size = part.shape.numel() * part.dtype.itemsize
    return memory[part.start : part.start + size].view(part.dtype).view(part.shape)
