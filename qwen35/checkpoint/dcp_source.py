"""Reading DCP checkpoints slice by slice, without any communication.

torch's own dcp.load reads each stored chunk whole, on every rank that needs some of it, and
compares no checksum. Where the chunks are is written as JSON, tensors.json, beside DCP's own
.metadata, a pickle that torch's tools read. This program reads .metadata only in checkpoints
without tensors.json, as earlier versions and torch itself write them.
"""

import json
import math
import os
import pickle
import weakref
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.checkpoint.dcp_folder import FORMAT, MANIFEST, METADATA, TENSOR_INDEX, damaged, read_file, read_manifest
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.lock import hold_for_reading
from qwen35.checkpoint.pickle_read import Pickled, called, fields_of, pairs, read_pickle
from qwen35.checkpoint.slices import TensorSlice, TensorSpec, is_shape
from qwen35.checkpoint.tensor_file import CODES, DIGITS, DTYPES, ChecksumError, Entry, blocks_in, read_slice
from qwen35.checkpoint.torch_archive import BROKEN_ARCHIVE, ArchivedTensor, find_tensor
from qwen35.errors import one_line

MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of the names in a checkpoint
MODULE = "torch.distributed.checkpoint."
TORCH_DTYPES = {str(dtype): dtype for dtype in CODES}
MAX_CELLS = 2**22  # of the grid that the chunks of one tensor form
MAX_NAME = 500  # characters
BROKEN = (pickle.UnpicklingError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Chunk:
    region: TensorSlice
    file: str
    begin: int  # offset of its bytes in the file, or without checksums, of torch's archive around them
    nbytes: int
    crc32: str | None  # checksums of all blocks


@dataclass(frozen=True)
class StoredTensor:
    spec: TensorSpec
    chunks: list[Chunk]


class DCPSource:
    """A TensorSource over a checkpoint's tensors under `prefix`, which is stripped from the names.

    Checksums are verified. As long as this object exists, no run removes the checkpoint
    (training.save_total_limit).
    """

    def __init__(self, checkpoint: str | Path, prefix: str = MODEL):
        """`checkpoint` holds .metadata. It is checked against its complete.json if it has one."""
        self.checkpoint, self.prefix = Path(checkpoint), prefix
        try:
            weakref.finalize(self, os.close, hold_for_reading(self.checkpoint / METADATA))
        except OSError as error:
            raise CheckpointError(f"{self.checkpoint}: {METADATA} cannot be read: {error.strerror}") from None
        manifest = read_manifest(self.checkpoint) if (self.checkpoint / MANIFEST).exists() else {}
        stored = _read_index(self.checkpoint, manifest)
        self._stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        self.specs: dict[str, TensorSpec] = {name: tensor.spec for name, tensor in self._stored.items()}
        self._checked: dict[Chunk, ArchivedTensor] = {}  # chunks without checksums of blocks

    def read(self, name: str, region: TensorSlice) -> Tensor:
        """Reads only the checksum blocks that hold the region, however large the stored chunks are.

        A chunk without checksums of blocks is read whole once.
        """
        out = torch.empty(region.lengths, dtype=self.specs[name].dtype)
        for chunk in self._stored[name].chunks:  # together they hold each element once
            overlap = chunk.region & region
            if overlap is not None:
                values = self._read_chunk(name, chunk, overlap.relative_to(chunk.region.offsets))
                if overlap == region:
                    return values
                out[overlap.relative_to(region.offsets).slices()] = values
        return out

    def _read_chunk(self, name: str, chunk: Chunk, part: TensorSlice) -> Tensor:
        """Read `part`, whose offsets are relative to the chunk."""
        path, spec = self.checkpoint / chunk.file, TensorSpec(chunk.region.lengths, self.specs[name].dtype)
        try:
            if chunk.crc32 is not None:
                return read_slice(path, Entry(spec, chunk.begin), part, chunk.crc32)
            if chunk not in self._checked:
                with path.open("rb") as file:
                    tensor = find_tensor(file, chunk.begin, chunk.nbytes, check=True)
                if tensor.spec != spec:
                    raise ChecksumError("it holds another tensor")
                self._checked[chunk] = tensor
            return self._checked[chunk].read(path, part)
        except OSError as error:
            raise CheckpointError(f"{self.checkpoint}: {self.prefix}{name} cannot be read: {one_line(error)}") from None
        except BROKEN_ARCHIVE as error:
            why = one_line(error) if isinstance(error, ChecksumError) else "it is not an archive written by torch"
            raise damaged(self.checkpoint, chunk.file, f"is damaged at {self.prefix}{name}: {why}") from None


def _read_index(checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Tensor name -> where it is stored. Raises CheckpointError for an invalid index."""
    file, parse = (TENSOR_INDEX, _from_json) if manifest.get("format") == FORMAT else (METADATA, _from_metadata)
    data = read_file(checkpoint, file, manifest)
    sizes = manifest.get("files") or {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.is_file()}
    try:
        stored = parse(data)
        for name, tensor in stored.items():
            _check(name, tensor, sizes)
    except BROKEN as error:  # it may quote the file
        raise CheckpointError(f"{checkpoint}: {file} is broken or not DCP's: {one_line(error)[:300]}") from None
    return stored


def _from_json(data: bytes) -> dict[str, StoredTensor]:
    stored = {}
    for name, fields in json.loads(data).items():
        spec, chunks = TensorSpec(_numbers(fields["shape"]), DTYPES[fields["dtype"]]), []
        for row in fields["chunks"]:
            region = TensorSlice(_numbers(row["start"]), _numbers(row["size"]))
            nbytes = region.numel * spec.dtype.itemsize
            chunks.append(Chunk(region, row["file"], row["begin"], nbytes, row["crc32"].lower()))
        stored[name] = StoredTensor(spec, chunks)
    return stored


def _from_metadata(data: bytes) -> dict[str, StoredTensor]:
    root = fields_of(read_pickle(data), MODULE + "metadata.Metadata")
    locations = {}
    for index, info in pairs(root["storage_data"]):
        key = fields_of(index, MODULE + "metadata.MetadataIndex")
        offsets = _size(key["offset"]) if key.get("offset") is not None else ()  # None: not a tensor
        locations[str(key["fqn"]), offsets] = fields_of(info, MODULE + "filesystem._StorageInfo")
    stored = {}
    for name, entry in pairs(root["state_dict_metadata"]):
        if isinstance(entry, Pickled) and entry.name == MODULE + "metadata.BytesStorageMetadata":
            continue
        fields = fields_of(entry, MODULE + "metadata.TensorStorageMetadata")
        dtype = called(fields["properties"], MODULE + "metadata.TensorProperties").state[0]
        if dtype not in TORCH_DTYPES:
            raise ValueError(f"{name}: its dtype is not supported")
        chunks = []
        for chunk in fields["chunks"]:
            extent = fields_of(chunk, MODULE + "metadata.ChunkStorageMetadata")
            region = TensorSlice(_size(extent["offsets"]), _size(extent["sizes"]))
            info = locations.get((name, region.offsets))
            if info is None:
                raise ValueError(f"{name}: part of it is missing")
            if info.get("transform_descriptors"):
                raise ValueError(f"{name}: it is stored in a form that is not supported")
            chunks.append(Chunk(region, info["relative_path"], info["offset"], info["length"], None))
        stored[name] = StoredTensor(TensorSpec(_size(fields["size"]), TORCH_DTYPES[dtype]), chunks)
    return stored


def _size(value: Any) -> tuple[int, ...]:
    (numbers,) = called(value, "torch.Size").args
    return _numbers(numbers)


def _numbers(values: Any) -> tuple[int, ...]:
    if not is_shape(values):
        raise ValueError("a shape or an offset is not made of whole numbers")
    return tuple(values)


def _check(name: str, stored: StoredTensor, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless chunks hold each element once and their bytes lie within files."""
    shape, itemsize = stored.spec.shape, stored.spec.dtype.itemsize
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError("a tensor in it has a name that no parameter can have")
    for chunk in stored.chunks:
        region = chunk.region
        if not len(region.offsets) == len(region.lengths) == len(shape):
            raise ValueError(f"{name}: one of its chunks has another number of axes")
        if any(s.stop > end for s, end in zip(region.slices(), shape, strict=True)):
            raise ValueError(f"{name}: one of its chunks lies outside of it")
        if not isinstance(chunk.file, str) or Path(chunk.file).name != chunk.file or chunk.file not in sizes:
            raise ValueError(f"{name}: its file is not one of this checkpoint")
        counts = (chunk.begin, chunk.nbytes)
        if not all(type(n) is int and 0 <= n < 2**63 for n in counts) or chunk.nbytes < region.numel * itemsize:
            raise ValueError(f"{name}: one of its chunks does not have the size of its bytes")
        if chunk.begin + chunk.nbytes > sizes[chunk.file]:
            raise ValueError(f"{name}: it lies beyond the end of {chunk.file}")
        if chunk.crc32 is not None and len(chunk.crc32) != blocks_in(chunk.nbytes) * DIGITS:
            raise ValueError(f"{name}: one of its chunks has too few or too many checksums")
    if not _hold_each_element_once(shape, [chunk.region for chunk in stored.chunks if chunk.region.numel]):
        raise ValueError(f"{name}: its chunks do not hold each element once")


def _hold_each_element_once(shape: tuple[int, ...], regions: list[TensorSlice]) -> bool:
    """Whether regions cover a tensor and no cell of the grid that their edges form twice."""
    if sum(region.numel for region in regions) != math.prod(shape):
        return False
    edges = [sorted({e for r in regions for e in (r.slices()[d].start, r.slices()[d].stop)}) for d in range(len(shape))]
    if math.prod(len(axis) for axis in edges) > MAX_CELLS:
        return False
    covered = torch.zeros([max(len(axis) - 1, 0) for axis in edges], dtype=torch.bool)
    for region in regions:
        ends = zip(edges, region.slices(), strict=True)
        cells = covered[tuple(slice(bisect_left(axis, s.start), bisect_left(axis, s.stop)) for axis, s in ends)]
        if cells.any():
            return False
        cells.fill_(True)
    return True  # as many elements as the tensor has, and none twice
