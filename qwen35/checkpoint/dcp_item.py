"""One tensor in a file of a DCP checkpoint: an archive written by torch.save, read slice by slice.

torch.load would read the whole tensor for every slice of it. Here only the archive's description is
read, which says where the bytes are.
"""

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from qwen35.checkpoint.checksums import ChecksumError, checksums
from qwen35.checkpoint.pickle_read import PERSISTENT, Name, called, read_pickle
from qwen35.checkpoint.safetensors_file import Entry, raw_bytes, read_into, read_slice
from qwen35.checkpoint.slices import PIECE_BYTES, TensorSlice, TensorSpec

BROKEN_ARCHIVE = (  # raised for a damaged archive, by zipfile and by reading the description
    zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, OverflowError,
    pickle.UnpicklingError, IndexError, KeyError, TypeError, ValueError,
)  # fmt: skip
MAX_DESCRIPTION_BYTES = 2**16  # of one tensor
LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip member: lengths of its name and of its extra field
STORAGES = {
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
class ArchivedTensor:
    """A tensor that torch.save wrote into a file, as a strided view of a flat storage."""

    path: Path
    spec: TensorSpec
    storage: Entry  # the storage, as a tensor of one axis
    first: int  # index in the storage of the tensor's first element
    strides: tuple[int, ...]
    crc32: int  # of the storage; 0 if torch.save was told to leave it out

    def check(self) -> None:
        """Compare the storage with its checksum. Raises OSError, ChecksumError."""
        crc, left = 0, self.storage.spec.nbytes if self.crc32 else 0
        buffer = memoryview(bytearray(min(PIECE_BYTES, left)))
        with self.path.open("rb") as file:
            while left:
                piece = buffer[:left]
                read_into(file.fileno(), piece, self.storage.begin + self.storage.spec.nbytes - left, self.path)
                crc, left = zlib.crc32(piece, crc), left - piece.nbytes
        if crc != self.crc32:
            raise ChecksumError("a checksum does not match")

    def read(self, region: TensorSlice) -> Tensor:
        if torch.empty_strided(self.spec.shape, self.strides, device="meta").is_contiguous():
            begin = self.storage.begin + self.first * self.spec.dtype.itemsize
            return read_slice(self.path, Entry(self.spec, begin), region)
        flat = read_slice(self.path, self.storage, TensorSlice.full(self.storage.spec.shape))
        return flat.as_strided(self.spec.shape, self.strides, self.first)[region.slices()]


@dataclass(frozen=True)
class ChunkWriteResult(WriteResult):
    """DCP's record of a written chunk, with what tensors.json says of it."""

    begin: int  # first byte of the tensor, counted from the start of the file
    crc32: str  # checksums of all blocks


def append_tensor(tensor: Tensor, index: MetadataIndex, path: Path, file: BufferedRandom) -> ChunkWriteResult:
    """Append a CPU tensor to the file `path`, open as "w+b", in DCP's format. Raises OSError."""
    compact = tensor.contiguous()
    if compact.untyped_storage().nbytes() > compact.nbytes:  # torch.save would write the whole storage
        compact = compact.clone()
    offset = file.tell()
    try:
        torch.save(compact, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # the cause, which torch's zip writer hides
            raise error.__context__ from None
        raise
    file.flush()
    length = file.tell() - offset
    begin = _archived_tensor(file.fileno(), path, offset, length).storage.begin
    return ChunkWriteResult(
        index, length, _StorageInfo(path.name, offset, length), begin, checksums(raw_bytes(compact))
    )


def find_archived_tensor(path: Path, offset: int, length: int) -> ArchivedTensor:
    """The tensor in the archive of `length` bytes at `offset` of a file.

    Raises OSError, or BROKEN_ARCHIVE for anything but one plain tensor.
    """
    with path.open("rb") as file:
        return _archived_tensor(file.fileno(), path, offset, length)


def _archived_tensor(fd: int, path: Path, offset: int, length: int) -> ArchivedTensor:
    with zipfile.ZipFile(_Section(fd, offset, length)) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "byteorder" in members and _text(archive, members["byteorder"]) != b"little":
            raise pickle.UnpicklingError("its byte order is not little-endian")
        view = _view(read_pickle(_text(archive, members["data.pkl"])))
        member = members[f"data/{view.key}"]
        stored = TensorSpec((view.numel,), view.dtype)
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != stored.nbytes:
            raise pickle.UnpicklingError("some of its bytes are missing")
        last = view.first + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
        if math.prod(view.shape) and not 0 <= view.first <= last < view.numel:
            raise pickle.UnpicklingError("it reaches beyond its storage")
        header = offset + member.header_offset
        name, extra = LOCAL_HEADER.unpack(os.pread(fd, LOCAL_HEADER.size, header))
        begin = header + LOCAL_HEADER.size + name + extra
        if begin + stored.nbytes > offset + length:
            raise pickle.UnpicklingError("its storage reaches beyond the archive")
    spec = TensorSpec(view.shape, view.dtype)
    return ArchivedTensor(path, spec, Entry(stored, begin), view.first, view.strides, member.CRC)


def _text(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MAX_DESCRIPTION_BYTES or member.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("its description is not torch's")
    if not member.CRC:
        del member.CRC  # so that zipfile does not compare it
    return archive.read(member)


@dataclass(frozen=True)
class _View:
    key: str  # of the storage
    numel: int  # of the storage
    dtype: torch.dtype
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(value: Any) -> _View:
    """The view that torch.save describes, which must be one plain tensor."""
    storage, first, shape, strides, *_ = called(value, "torch._utils._rebuild_tensor_v2").args
    _, kind, key, _, numel = called(storage, PERSISTENT).args[0]
    dtype = STORAGES.get(kind.removeprefix("torch.")) if isinstance(kind, Name) else None
    if dtype is None or not all(type(n) is int and n >= 0 for n in (first, numel, *shape, *strides)):
        raise pickle.UnpicklingError("it is not a plain tensor")
    return _View(str(key), numel, dtype, first, shape, strides)


class _Section(io.RawIOBase):
    """Part of a file, as a file."""

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
