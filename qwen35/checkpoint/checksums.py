"""crc32 of what a checkpoint holds: one for every BLOCK of a chunk's bytes, so that a part is checked by reading little more.

zlib leaves Python's lock alone meanwhile.
"""

import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from qwen35.checkpoint.safetensors_file import Entry, raw_bytes, read_into, runs_of
from qwen35.checkpoint.slices import TensorSlice

BLOCK = 2**18  # bytes; a part of the format
DIGITS = 8  # of each checksum, in base 16


class ChecksumError(ValueError):
    """Bytes that are not those which were written."""


def checksum(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):0{DIGITS}x}"


def checksums(data: memoryview) -> str:
    """Of every block, one behind the other."""
    return "".join(checksum(data[begin : begin + BLOCK]) for begin in range(0, data.nbytes, BLOCK))


def blocks_in(nbytes: int) -> int:
    return -(-nbytes // BLOCK)


def read_slice_checked(path: Path, entry: Entry, wanted: str, region: TensorSlice) -> Tensor:
    """The elements `region` of a tensor of a file, out of blocks that are read whole. Raises OSError, ChecksumError."""
    itemsize, out, filled = entry.spec.dtype.itemsize, torch.empty(0, dtype=entry.spec.dtype), 0
    first, last, held = 0, 0, torch.empty(0, dtype=torch.uint8)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, count in runs_of(entry.spec.shape, region):
            begin, end = offset * itemsize, (offset + count) * itemsize
            if begin < first or end > last:
                first, last = begin // BLOCK * BLOCK, min(blocks_in(end) * BLOCK, entry.spec.nbytes)
                held = torch.empty(last - first, dtype=torch.uint8)
                data = raw_bytes(held)
                read_into(fd, data, entry.begin + first, path)
                place = first // BLOCK * DIGITS
                if checksums(data) != wanted[place : place + blocks_in(last - first) * DIGITS]:
                    raise ChecksumError("a checksum is not that of what was written")
            values = held[begin - first : end - first].view(entry.spec.dtype)
            if count == region.numel:
                return values.view(region.lengths)
            if not filled:
                out = torch.empty(region.numel, dtype=entry.spec.dtype)
            out[filled : filled + count] = values
            filled += count
    finally:
        os.close(fd)
    return out.view(region.lengths)
