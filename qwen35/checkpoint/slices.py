"""Slices of tensors: tensors are read, moved and written slice by slice, never whole."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# How much of a tensor a thread holds at a time while it streams from file to file. The allocator
# reuses memory of this size; much larger blocks are mapped anew for every piece, which takes longer
# than reading it.
PIECE_BYTES = 8 * 2**20
MAX_AXES = 16  # of a tensor; a file that claims more is damaged


def is_shape(values: Sequence[object]) -> bool:
    """Whether a tensor can have this shape."""
    is_valid = len(values) <= MAX_AXES and all(type(n) is int and n >= 0 for n in values)
    # torch counts bytes in 63 bits, and multiplies the other axes even where one is empty
    return is_valid and math.prod(n or 1 for n in values if type(n) is int) < 2**60


@dataclass(frozen=True)
class TensorSpec:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSlice:
    """A rectangular region of a tensor: all i with offsets[d] <= i[d] < offsets[d] + lengths[d]."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @staticmethod
    def full(shape: Sequence[int]) -> "TensorSlice":
        return TensorSlice((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.lengths)

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.offsets, self.lengths, strict=True))

    def relative_to(self, origin: Sequence[int]) -> "TensorSlice":
        """The same elements, with offsets counted from `origin`."""
        return TensorSlice(tuple(a - o for a, o in zip(self.offsets, origin, strict=True)), self.lengths)

    def __and__(self, other: "TensorSlice") -> "TensorSlice | None":
        """The intersection; None if it is empty."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = (min(a.stop, b.stop) for a, b in zip(self.slices(), other.slices(), strict=True))
        lengths = tuple(end - offset for offset, end in zip(offsets, ends, strict=True))
        return TensorSlice(offsets, lengths) if all(n > 0 for n in lengths) else None


class TensorSource(Protocol):
    """Tensors under the model's parameter names that can be read slice by slice."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, region: TensorSlice) -> Tensor:
        """A region of a tensor: on the CPU, in the stored dtype, of shape region.lengths."""
        ...


class MemorySource:
    """A TensorSource over whole tensors in memory, on any device."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def read(self, name: str, region: TensorSlice) -> Tensor:
        return self.tensors[name][region.slices()].cpu()


def pieces(region: TensorSlice, itemsize: int, limit: int = PIECE_BYTES) -> Iterator[TensorSlice]:
    """Cut a region along its leading axes into pieces of `limit` bytes, in row-major order."""
    if region.numel == 0:
        return
    axis = next((d for d, n in enumerate(region.lengths) if n > 1), None)
    if axis is None or region.numel * itemsize <= limit:
        yield region
        return
    row = region.numel // region.lengths[axis] * itemsize
    step = max(1, limit // row)
    for first in range(0, region.lengths[axis], step):
        count = min(step, region.lengths[axis] - first)
        offsets = (*region.offsets[:axis], region.offsets[axis] + first, *region.offsets[axis + 1 :])
        part = TensorSlice(offsets, (*region.lengths[:axis], count, *region.lengths[axis + 1 :]))
        # a single row may still be too large
        if row > limit:
            yield from pieces(part, itemsize, limit)
        else:
            yield part


def local_part(tensor: Tensor) -> tuple[Tensor, TensorSlice]:
    """This rank's part of a tensor, which may be empty, and the region that it covers globally."""
    if not isinstance(tensor, DTensor):
        return tensor, TensorSlice.full(tensor.shape)
    lengths, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), TensorSlice(tuple(offsets), tuple(lengths))
