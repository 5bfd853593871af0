"""crc32 checksums of the tensors in a checkpoint, computed without the GIL.

There is one for every BLOCK bytes of a chunk, so checking a slice reads little more than the slice.
"""

import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from qwen35.checkpoint.safetensors_file import Entry, raw_bytes, read_into, runs_of
from qwen35.checkpoint.slices import TensorSlice

BLOCK = 2**18  # bytes; part of the file format
DIGITS = 8  # hexadecimal digits of one checksum


class ChecksumError(ValueError):
    """The bytes read differ from the bytes that were written."""


def checksum(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):0{DIGITS}x}"


def checksums(data: memoryview) -> str:
    """The checksums of all blocks, concatenated."""
    return "".join(checksum(data[begin : begin + BLOCK]) for begin in range(0, data.nbytes, BLOCK))


def blocks_in(nbytes: int) -> int:
    return -(-nbytes // BLOCK)


def read_slice_checked(path: Path, entry: Entry, wanted: str, region: TensorSlice) -> Tensor:
    """A region of a tensor, out of blocks that are checked. Raises OSError, ChecksumError."""
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
                digit = first // BLOCK * DIGITS
                if checksums(data) != wanted[digit : digit + blocks_in(last - first) * DIGITS]:
                    raise ChecksumError("a checksum does not match")
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
