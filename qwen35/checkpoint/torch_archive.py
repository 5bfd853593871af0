"""An archive that torch.save made of one tensor, read slice by slice.

torch.load would read the whole tensor for every slice of it, believe the size that the archive
claims, and ignore its checksum. Here zipfile compares the checksum, and says where the bytes are.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qwen35.checkpoint.pickle_read import PERSISTENT, Name, called, read_pickle
from qwen35.checkpoint.slices import PIECE_BYTES, TensorSlice, TensorSpec
from qwen35.checkpoint.tensor_file import ChecksumError, Entry, read_slice

BROKEN_ARCHIVE = (  # raised for a damaged archive, by zipfile and by reading the description
    zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, OverflowError,
    pickle.UnpicklingError, IndexError, KeyError, TypeError, ValueError,
)  # fmt: skip
MAX_DESCRIPTION_BYTES = 2**16  # of one tensor
LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip member: lengths of its name and of its extra field
STORAGES = {
    "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "IntStorage": torch.int32, "LongStorage": torch.int64, "ShortStorage": torch.int16,
}  # fmt: skip


@dataclass(frozen=True)
class ArchivedTensor:
    """A tensor in an archive, as a strided view of a flat storage."""

    spec: TensorSpec
    storage: Entry  # the storage, as a tensor of one axis
    first: int  # index in the storage of the tensor's first element
    strides: tuple[int, ...]

    def read(self, path: Path, region: TensorSlice) -> Tensor:
        if torch.empty_strided(self.spec.shape, self.strides, device="meta").is_contiguous():
            begin = self.storage.begin + self.first * self.spec.dtype.itemsize
            return read_slice(path, Entry(self.spec, begin), region)
        flat = read_slice(path, self.storage, TensorSlice.full(self.storage.spec.shape))
        return flat.as_strided(self.spec.shape, self.strides, self.first)[region.slices()]


def find_tensor(file: IO[bytes], offset: int, length: int, check: bool) -> ArchivedTensor:
    """The tensor in the archive of `length` bytes at `offset`. `check` compares its checksum.

    Raises OSError, or BROKEN_ARCHIVE for anything but one plain tensor.
    """
    with zipfile.ZipFile(_Section(file.fileno(), offset, length)) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "byteorder" in members and _text(archive, members["byteorder"]) != b"little":
            raise pickle.UnpicklingError("its byte order is not little-endian")
        rebuilt = called(read_pickle(_text(archive, members["data.pkl"])), "torch._utils._rebuild_tensor_v2")
        storage, first, shape, strides, *_ = rebuilt.args
        _, kind, key, _, numel = called(storage, PERSISTENT).args[0]
        dtype = STORAGES.get(kind.removeprefix("torch.")) if isinstance(kind, Name) else None
        if dtype is None or not all(type(n) is int and n >= 0 for n in (first, numel, *shape, *strides)):
            raise pickle.UnpicklingError("it is not a plain tensor")
        spec, member = TensorSpec((numel,), dtype), members[f"data/{key}"]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != spec.nbytes:
            raise pickle.UnpicklingError("some of its bytes are missing")
        last = first + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if all(shape) and not 0 <= first <= last < numel:
            raise pickle.UnpicklingError("it reaches beyond its storage")
        header, size = offset + member.header_offset, LOCAL_HEADER.size
        begin = header + size + sum(LOCAL_HEADER.unpack(os.pread(file.fileno(), size, header)))
        if begin + spec.nbytes > offset + length:
            raise pickle.UnpicklingError("its storage reaches beyond the archive")
        if check and member.CRC:  # torch.save may be told to leave it out
            with archive.open(member) as stored:
                try:
                    while stored.read(PIECE_BYTES):
                        pass
                except zipfile.BadZipFile:
                    raise ChecksumError("a checksum does not match") from None
    return ArchivedTensor(TensorSpec(shape, dtype), Entry(spec, begin), first, strides)


def _text(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MAX_DESCRIPTION_BYTES or member.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("its description is not torch's")
    if not member.CRC:
        del member.CRC  # so that zipfile does not compare it
    return archive.read(member)


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
