"""A batch on its way from a worker to the process that trains: all of its tensors in one piece of shared memory.

Each tensor that a process hands to another costs both of them a file descriptor and a conversation, a third of a millisecond;
a batch has a dozen.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen35.batch import PackedBatch, each
from qwen35.errors import SettingError

ALIGN = 64  # bytes: any type may begin there, and a line of the cache does


@dataclass(frozen=True)
class Place:
    """Of a tensor in the shared memory."""

    start: int  # bytes
    shape: torch.Size
    dtype: torch.dtype


def shared_memory(size: int) -> Tensor:
    """[size] uint8. Raises SettingError where there is no room: containers have 64 MB of it unless they are told otherwise."""
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


class Parcel:
    """Pickle it, and what comes out is the PackedBatch again, whose tensors are views of the one memory."""

    def __init__(self, batch: PackedBatch):
        tensors: list[tuple[Place, Tensor]] = []
        size = 0

        def place(tensor: Tensor) -> Place:
            nonlocal size
            tensors.append((Place(size, tensor.shape, tensor.dtype), tensor))
            size += math.ceil(tensor.nbytes / ALIGN) * ALIGN
            return tensors[-1][0]

        self.outline = each(batch, place)
        self.memory = shared_memory(size)
        for where, tensor in tensors:
            view(self.memory, where).copy_(tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        return unpack, (self.outline, self.memory)


def unpack(outline: PackedBatch, memory: Tensor) -> PackedBatch:
    return each(outline, lambda where: view(memory, where), of=Place)


def view(memory: Tensor, where: Place) -> Tensor:
    size = where.shape.numel() * where.dtype.itemsize
    return memory[where.start : where.start + size].view(where.dtype).view(where.shape)
