"""The safetensors format: 8 bytes of header length, a JSON header, then the bytes of the tensors.

https://huggingface.co/docs/safetensors specifies it. Files are read and written here by plain reads
and writes, not by a memory map: exactly the bytes asked for are read, a truncated file or a full
disk is an OSError and not a bus error, and the pages do not count as memory of this process. This
file knows no model.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.checkpoint.errors import CheckpointError, abbreviate
from qwen35.checkpoint.folders import flush_soon
from qwen35.checkpoint.slices import TensorSlice, TensorSpec, is_shape

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class Entry:
    spec: TensorSpec
    begin: int  # first byte of the tensor, counted from the start of the file


@dataclass(frozen=True)
class Header:
    raw: bytes  # everything before the first tensor
    entries: dict[str, Entry]  # in file order
    nbytes: int  # size of the file


def read_header(path: Path) -> Header:
    """Raises CheckpointError if the file is not safetensors, or not as long as its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path}: truncated, or not a safetensors file ({size} bytes)")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        fields = json.loads(text)
        rows = [_parse_row(name, f) for name, f in fields.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: broken safetensors header") from None
    entries, end = {}, 0
    for name, code, shape, first, last in sorted(rows, key=lambda row: row[3]):
        if code not in DTYPES:
            raise CheckpointError(
                f"{path}: {abbreviate([name])} has dtype {abbreviate([code])}, which is not supported"
            )
        spec = TensorSpec(shape, DTYPES[code])
        if first != end or last - first != spec.nbytes:
            raise CheckpointError(
                f"{path}: broken safetensors header: {abbreviate([name])} does not lie where it should"
            )
        entries[name] = Entry(spec, 8 + length + first)
        end = last
    if size != 8 + length + end:
        raise CheckpointError(f"{path}: truncated or damaged: {size} bytes, its header says {8 + length + end}")
    return Header(length.to_bytes(8, "little") + text, entries, size)


def _parse_row(name: str, fields: dict[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    """(name, dtype code, shape, first byte, end). Raises KeyError, TypeError, ValueError."""
    first, last = fields["data_offsets"]
    code, shape = fields["dtype"], tuple(fields["shape"])
    if not (isinstance(code, str) and is_shape(shape) and type(first) is type(last) is int and 0 <= first <= last):
        raise ValueError(name)
    return name, code, shape, first, last


def make_header(specs: Mapping[str, TensorSpec]) -> Header:
    """The header of a new file, ordered as by the safetensors library: widest dtype, then name."""
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    fields, begins, end = {}, {}, 0
    for name in order:
        spec, begins[name] = specs[name], end
        end += spec.nbytes
        fields[name] = {"dtype": CODES[spec.dtype], "shape": spec.shape, "data_offsets": (begins[name], end)}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    entries = {name: Entry(specs[name], len(raw) + begins[name]) for name in order}
    return Header(raw, entries, len(raw) + end)


def read_slice(path: Path, entry: Entry, region: TensorSlice) -> Tensor:
    """One region of a tensor in the file; exactly its bytes are read. Raises CheckpointError."""
    out = torch.empty(region.lengths, dtype=entry.spec.dtype)
    view = raw_bytes(out)
    itemsize, filled = entry.spec.dtype.itemsize, 0
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            for offset, count in runs_of(entry.spec.shape, region):
                length = count * itemsize
                read_into(fd, view[filled : filled + length], entry.begin + offset * itemsize, path)
                filled += length
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return out


def write_at(path: Path, position: int, data: bytes | memoryview) -> None:
    """Write bytes into an existing file. Raises OSError."""
    view, end = memoryview(data), position
    fd = os.open(path, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        while view.nbytes:
            count = os.pwrite(fd, view, end)  # at most 2 GiB at a time
            view, end = view[count:], end + count
        flush_soon(fd, position, end - position)
    finally:
        os.close(fd)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_into(fd: int, view: memoryview, position: int, path: Path) -> None:
    while view.nbytes:
        got = os.preadv(fd, [view], position)  # at most 2 GiB at a time
        if got == 0:
            raise CheckpointError(f"{path}: truncated while it was read")
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
