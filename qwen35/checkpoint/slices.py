"""Slices of tensors: tensors are read, moved and written slice by slice, never whole.

A source reads slices from anywhere; a rank fills its own part of a tensor from it.
"""

import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from qwen35.checkpoint.errors import CheckpointError
from qwen35.log import logger

# How much of a tensor a thread holds at a time while it streams from file to file. The allocator
# reuses memory of this size; much larger blocks are mapped anew for every piece, which takes longer
# than reading it.
PIECE_BYTES = 8 * 2**20
# Threads that read ahead: at least two, so that one computes while another waits for the disk.
THREADS = max(2, min(8, len(os.sched_getaffinity(0))))
HOLE = 1 << 15  # values of a matrix that are never all zero in a row, but where a download left a hole
MAY_BE_ZERO = re.compile(r"embed_tokens|lm_head|lora_")  # rows of ids that no token has; new adapters
MAX_AXES = 16  # of a tensor; a file that claims more is damaged

Item = TypeVar("Item")
Result = TypeVar("Result")


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


@dataclass(frozen=True)
class LocalShard:
    """This rank's part of a tensor."""

    values: Tensor
    region: TensorSlice  # of the global tensor
    shape: tuple[int, ...]  # of the global tensor


class TensorSource(Protocol):
    """Tensors under the model's parameter names that can be read slice by slice."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, region: TensorSlice) -> Tensor:
        """A region of a tensor: on the CPU, in the stored dtype, of shape region.lengths."""
        ...


class FiniteSource:
    """A TensorSource that raises CheckpointError for values that are NaN or infinite, and warns,
    once, of a matrix with a long run of zeros."""

    def __init__(self, source: TensorSource, where: str | Path):
        self.source, self.where, self.specs = source, where, source.specs
        self.warned = threading.Lock()  # held from the first warning on: several threads read

    def read(self, name: str, region: TensorSlice) -> Tensor:
        values = self.source.read(name, region)
        # aminmax is NaN if any value is; it takes 1 ms for 8 MiB, testing each value 20 to 50 ms
        if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            count = int((~torch.isfinite(values)).sum())
            raise CheckpointError(
                f"{self.where}: {name} has NaN or infinite values, {count:,} in a piece of {values.numel():,}; the weights are "
                "damaged, or the run that made them diverged"
            )
        if (
            len(self.specs[name].shape) > 1
            and not MAY_BE_ZERO.search(name)
            and not self.warned.locked()
            and has_hole(values)
            and self.warned.acquire(blocking=False)
        ):
            logger.warning(
                f"{self.where}: {name} is zero in whole stretches, perhaps others are, too: what was not there yet when a"
                " download, a copy or a save broke off; fetch it again (make download checks every file), unless it is meant"
            )
        return values


def has_hole(values: Tensor) -> bool:
    """Whether HOLE values in a row, or all of fewer, are zero."""
    flat = values.reshape(-1)
    size = min(HOLE, len(flat))
    if not size or flat[::size].all():  # weights are hardly ever exactly zero, so this is mostly enough
        return False
    return bool((flat[: len(flat) // size * size].view(-1, size) == 0).all(1).any())


def pieces(region: TensorSlice, itemsize: int, limit: int = PIECE_BYTES) -> Iterator[TensorSlice]:
    """Cut a region along its leading axes into pieces of `limit` bytes, in row-major order.

    An empty region is one piece.
    """
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


def in_range(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The values as they are. Raises CheckpointError for finite ones that float16 cannot hold."""
    if dtype == torch.float16 != values.dtype and values.to(dtype).isinf().any():
        raise CheckpointError(
            f"{name} has values beyond {torch.finfo(dtype).max:,.0f}, the largest of float16; use bf16"
        )
    return values


def local_part(tensor: Tensor) -> tuple[Tensor, TensorSlice]:
    """This rank's part of a tensor, which may be empty, and the region that it covers globally."""
    if not hasattr(tensor, "placements"):  # no DTensor: what works on whole tensors need not import them
        return tensor, TensorSlice.full(tensor.shape)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    lengths, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), TensorSlice(tuple(offsets), tuple(lengths))


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], source: TensorSource, progress: Callable[[int], object] | None = None) -> None:
    """Copy this rank's part of each tensor, cast to its dtype. Names and shapes must fit."""
    for name, tensor in tensors.items():
        local, region = local_part(tensor)
        itemsize = source.specs[name].dtype.itemsize
        for piece in pieces(region, itemsize):
            values = source.read(name, piece)
            local[piece.relative_to(region.offsets).slices()].copy_(in_range(values, tensor.dtype, name))
            if progress:
                progress(values.nbytes)


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS
) -> Generator[Result, None, None]:
    """work(item) for each item, in order, done by threads; each is one item ahead of the caller.

    A caller that may not take all must close it: left to the garbage collector, which may run
    while a thread starts, it would wait for its threads under a lock that they need to end.
    """
    running: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:  # after an error or an interrupt nothing more is begun
            for left in running:
                left.cancel()
