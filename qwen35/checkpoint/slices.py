"""Rectangular parts of tensors: what is read, moved and written piece by piece."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# bytes that a thread holds at a time while tensors stream from file to file; memory of this size is used again, much more
# comes fresh from the kernel for every piece, which takes longer than to read it
PIECE = 8 * 2**20
AXES = 16  # of a tensor; more of them are nobody's layout


def is_shape(values: Sequence[object]) -> bool:
    """Whether a tensor could have this shape. Where one axis is empty, torch multiplies the others all the same."""
    is_counted = len(values) <= AXES and all(type(n) is int and n >= 0 for n in values)
    return (
        is_counted and math.prod(n or 1 for n in values if type(n) is int) < 2**60
    )  # its bytes are counted in 63 bits


@dataclass(frozen=True)
class TensorSpec:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Box:
    """The elements start[d] <= i_d < start[d] + size[d] of a tensor."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> "Box":
        return Box((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))

    def seen_from(self, origin: Sequence[int]) -> "Box":
        """The same elements, counted from `origin`."""
        return Box(tuple(a - o for a, o in zip(self.start, origin, strict=True)), self.size)

    def __and__(self, other: "Box") -> "Box | None":
        start = tuple(map(max, self.start, other.start))
        end = [min(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)]
        size = tuple(e - s for s, e in zip(start, end, strict=True))
        return Box(start, size) if all(n > 0 for n in size) else None


class Source(Protocol):
    """Tensors under the model's names, read part by part: of a Hugging Face folder, a DCP checkpoint, memory."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, box: Box) -> Tensor:
        """The elements `box` of tensor `name`, in a CPU tensor of the stored dtype and of shape box.size."""
        ...


class TensorSource:
    """Source over whole tensors in memory (of any device)."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def read(self, name: str, box: Box) -> Tensor:
        return self.tensors[name][box.slices()].cpu()


def pieces(box: Box, itemsize: int, limit: int = PIECE) -> Iterator[Box]:
    """Cut a box along its leading axes into boxes of at most `limit` bytes, in row-major order."""
    if box.numel == 0:
        return
    axis = next((d for d, n in enumerate(box.size) if n > 1), None)
    if axis is None or box.numel * itemsize <= limit:
        yield box
        return
    row = box.numel // box.size[axis] * itemsize
    step = max(1, limit // row)
    for first in range(0, box.size[axis], step):
        count = min(step, box.size[axis] - first)
        start = (*box.start[:axis], box.start[axis] + first, *box.start[axis + 1 :])
        part = Box(start, (*box.size[:axis], count, *box.size[axis + 1 :]))
        # a single row may still be too large: cut it along the next axis
        if row > limit:
            yield from pieces(part, itemsize, limit)
        else:
            yield part


def local_part(tensor: Tensor) -> tuple[Tensor, Box]:
    """This rank's own part of a tensor and where it lies in the whole; a plain tensor is its own whole.

    Works for every sharding that a DTensor can have, uneven ones too; the part may be empty.
    """
    if not isinstance(tensor, DTensor):
        return tensor, Box.whole(tensor.shape)
    size, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), Box(tuple(start), tuple(size))
