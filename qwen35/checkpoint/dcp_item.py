"""One tensor in a file of a DCP checkpoint: an archive that torch.save writes, of which any part is read by itself.

torch.load reads a tensor whole for every part of it; here the description alone is read, and tells where the bytes lie.
"""

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qwen35.checkpoint.boxes import Box, TensorSpec
from qwen35.checkpoint.safetensors_file import Entry, read_box

BROKEN_ARCHIVE = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError)  # what zipfile raises for broken data
LOCAL_HEADER = struct.Struct("<26x2H")  # of a member of a zip archive: the lengths of its name and of its extra field
STORAGES = {  # torch's names for the kinds of bytes
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


@dataclass(frozen=True)
class DCPItem:
    """A tensor of a file."""

    path: Path
    spec: TensorSpec
    storage: Entry  # the bytes that the tensor is a view of, as a tensor of one axis
    first: int  # element of the storage
    strides: tuple[int, ...]

    def read(self, box: Box) -> Tensor:
        if torch.empty_strided(self.spec.shape, self.strides, device="meta").is_contiguous():
            begin = self.storage.begin + self.first * self.spec.dtype.itemsize
            return read_box(self.path, Entry(self.spec, begin), box)
        flat = read_box(self.path, self.storage, Box.whole(self.storage.spec.shape))
        return flat.as_strided(self.spec.shape, self.strides, self.first)[box.slices()]


def save_tensor(tensor: Tensor, file: BinaryIO) -> None:
    """Append a CPU tensor to a file as DCP's reader expects it. Raises OSError."""
    # torch.save writes the whole storage, of which a shard may be a part
    alone = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
    try:
        torch.save(alone, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # the reason, which torch's zip writer hides
            raise error.__context__ from None
        raise


def find_item(path: Path, offset: int, length: int) -> DCPItem:
    """The tensor whose archive is the file's bytes from `offset` on.

    Raises OSError, BROKEN_ARCHIVE, and what pickle raises for broken data; a description that names anything but one
    plain tensor is refused.
    """
    with path.open("rb") as file, zipfile.ZipFile(_Section(file.fileno(), offset, length)) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise pickle.UnpicklingError("its bytes are in another order")
        with archive.open(members["data.pkl"]) as description:
            view = _Description(description).load()
        if not isinstance(view, _View):
            raise pickle.UnpicklingError(f"it holds a {type(view).__name__}")
        member = members[f"data/{view.key}"]
        stored = TensorSpec((view.numel,), view.dtype)
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != stored.nbytes:
            raise pickle.UnpicklingError("its bytes are not there in full")
        last = view.first + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
        if math.prod(view.shape) and not 0 <= view.first <= last < view.numel:
            raise pickle.UnpicklingError("it goes beyond its bytes")
        header = offset + member.header_offset
        name, extra = LOCAL_HEADER.unpack(os.pread(file.fileno(), LOCAL_HEADER.size, header))
        begin = header + LOCAL_HEADER.size + name + extra
    return DCPItem(path, TensorSpec(view.shape, view.dtype), Entry(stored, begin), view.first, view.strides)


@dataclass(frozen=True)
class _View:
    key: str  # of the storage
    numel: int  # of the storage
    dtype: torch.dtype
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(storage: tuple[str, int, torch.dtype], first: int, shape: Any, strides: Any, *rest: Any) -> _View:
    """Stands in for what rebuilds a tensor when torch loads it."""
    key, numel, dtype = storage
    return _View(key, numel, dtype, int(first), tuple(map(int, shape)), tuple(map(int, strides)))


class _Description(pickle.Unpickler):
    """Refuses all that is not one plain tensor: a file of unknown origin cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")

    def persistent_load(self, pid: Any) -> tuple[str, int, torch.dtype]:
        word, dtype, key, _, numel = pid
        if word != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{word!r} has no place in it")
        return str(key), int(numel), dtype


class _Section(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, fd: int, begin: int, length: int):
        self.fd, self.begin, self.length, self.position = fd, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.length)[whence]
        if self.position < 0:
            raise OSError("before the beginning")
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        got = os.preadv(self.fd, [view], self.begin + self.position)
        self.position += got
        return got
