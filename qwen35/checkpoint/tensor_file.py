"""Tensors as bytes in files: safetensors headers, reading slice by slice, and checksums.

The safetensors library checks headers, but its slices are not used: mapped into memory their pages
count as memory of this process and a file that is cut off meanwhile is a bus error; with "pread"
each slice costs its whole tensor. Here exactly the bytes asked for are read. Those that this
program wrote have a CRC-32 for every BLOCK bytes, so a slice can be checked without the rest.
"""

import errno
import itertools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen35.checkpoint.errors import CheckpointError, abbreviate
from qwen35.checkpoint.slices import TensorSlice, TensorSpec, is_shape
from qwen35.errors import naming, one_line

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 2**18  # bytes; part of the format of tensors.json
DIGITS = 8  # hexadecimal digits of one checksum


class ChecksumError(ValueError):
    """The bytes read differ from the bytes that were written."""


@dataclass(frozen=True)
class Entry:
    spec: TensorSpec
    begin: int  # first byte of the tensor, counted from the start of the file


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in its order. Raises CheckpointError for other files."""
    try:
        with safe_open(path, "np") as file:  # checks that tensors lie one after another and fill the file
            fields = {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape()) for n in file.offset_keys()}
        with path.open("rb") as raw:
            begin = 8 + int.from_bytes(raw.read(8), "little")
    except (OSError, SafetensorError) as error:
        why = f"{one_line(error)[:200]}; fetch it again"
        raise CheckpointError(f"{path}: truncated, damaged, or not a safetensors file: {why}") from None
    entries = {}
    for name, (code, shape) in fields.items():
        if code not in DTYPES or not is_shape(shape):
            what = f"dtype {code}" if code not in DTYPES else f"the shape {abbreviate([str(shape)])}"
            raise CheckpointError(f"{path}: {abbreviate([name])} has {what}, which is not supported")
        entries[name] = Entry(TensorSpec(tuple(shape), DTYPES[code]), begin)
        begin += entries[name].spec.nbytes
    return entries


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def checksum(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):0{DIGITS}x}"  # computed without the GIL


def checksums(data: memoryview) -> str:
    """The checksums of all blocks, concatenated."""
    return "".join(checksum(data[begin : begin + BLOCK]) for begin in range(0, data.nbytes, BLOCK))


def blocks_in(nbytes: int) -> int:
    return -(-nbytes // BLOCK)


def read_slice(path: Path, entry: Entry, region: TensorSlice, crc32: str | None = None) -> Tensor:
    """One region of a tensor: exactly its bytes are read, or the blocks that hold it.

    crc32: the checksums of all blocks, which are compared. Raises OSError, ChecksumError.
    """
    itemsize = entry.spec.dtype.itemsize
    out, filled = torch.empty(region.numel if crc32 is None else 0, dtype=entry.spec.dtype), 0
    first, last, held = 0, 0, out
    with naming(path), path.open("rb", buffering=0) as file:
        for offset, count in runs_of(entry.spec.shape, region):
            begin, end = offset * itemsize, (offset + count) * itemsize
            if crc32 is None:
                read_into(file.fileno(), raw_bytes(out[filled : filled + count]), entry.begin + begin)
                filled += count
                continue
            if begin < first or end > last:
                first, last = begin // BLOCK * BLOCK, min(blocks_in(end) * BLOCK, entry.spec.nbytes)
                held = torch.empty(last - first, dtype=torch.uint8)
                read_into(file.fileno(), raw_bytes(held), entry.begin + first)
                digit = first // BLOCK * DIGITS
                if checksums(raw_bytes(held)) != crc32[digit : digit + blocks_in(last - first) * DIGITS]:
                    raise ChecksumError("a checksum does not match")
            values = held[begin - first : end - first].view(entry.spec.dtype)
            if count == region.numel:
                return values.view(region.lengths)
            if not filled:
                out = torch.empty(region.numel, dtype=entry.spec.dtype)
            out[filled : filled + count] = values
            filled += count
    return out.view(region.lengths)


def read_into(fd: int, view: memoryview, position: int) -> None:
    while view.nbytes:
        got = os.preadv(fd, [view], position)  # at most 2 GiB at a time
        if got == 0:
            raise OSError(errno.EIO, "truncated while it was read")
        view, position = view[got:], position + got


def runs_of(shape: Sequence[int], region: TensorSlice) -> Iterator[tuple[int, int]]:
    """The contiguous runs of a region, in row-major order, as (offset, count) in elements."""
    if region.numel == 0:
        return
    # the axes after `axis` are covered in full, so one run spans region.lengths[axis] of their rows
    axis = len(shape)
    while axis > 0 and region.lengths[axis - 1] == shape[axis - 1]:
        axis -= 1
    axis = max(axis - 1, 0)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    count = math.prod(region.lengths[axis:])
    base = sum(a * s for a, s in zip(region.offsets, strides, strict=True))
    for index in itertools.product(*(range(n) for n in region.lengths[:axis])):
        yield base + sum(i * s for i, s in zip(index, strides[:axis], strict=True)), count
