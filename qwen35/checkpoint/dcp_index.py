"""The index of a DCP checkpoint: shapes, dtypes and chunks of its tensors.

It is written as JSON, tensors.json, beside DCP's own .metadata, a pickle that torch's tools read.
This program reads .metadata only in checkpoints without tensors.json, as earlier versions and torch
itself write them.
"""

import json
import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from qwen35.checkpoint.checksums import DIGITS, blocks_in
from qwen35.checkpoint.dcp_folder import FORMAT, METADATA, TENSOR_INDEX, read_file
from qwen35.checkpoint.dcp_item import ChunkWriteResult
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.pickle_read import Pickled, called, fields_of, pairs, read_pickle
from qwen35.checkpoint.safetensors_file import CODES, DTYPES
from qwen35.checkpoint.slices import TensorSlice, TensorSpec, is_shape
from qwen35.errors import one_line

MODULE = "torch.distributed.checkpoint."
TORCH_DTYPES = {str(dtype): dtype for dtype in CODES}
MAX_CUTS = 32  # depth to which a tensor may be split into chunks; more would take long to check
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


def describe(metadata: Metadata, results: Iterable[WriteResult]) -> str:
    """The text of tensors.json. Raises CheckpointError if part of a tensor was not written."""
    written, tensors = {result.index: result for result in results if isinstance(result, ChunkWriteResult)}, {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # always: extras are separate files
        rows = []
        for chunk in entry.chunks:
            result = written.get(MetadataIndex(name, chunk.offsets))
            if result is None:
                raise CheckpointError(f"a part of {name} was not written")
            stored = {"file": result.storage_data.relative_path, "begin": result.begin, "crc32": result.crc32}
            rows.append({"start": list(chunk.offsets), "size": list(chunk.sizes), **stored})
        tensors[name] = {"dtype": CODES[entry.properties.dtype], "shape": list(entry.size), "chunks": rows}
    return json.dumps(tensors)


def read_index(checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Tensor name -> where it is stored. Raises CheckpointError for an invalid index."""
    file, parse = (TENSOR_INDEX, _from_json) if manifest.get("format") == FORMAT else (METADATA, _from_metadata)
    data = read_file(checkpoint, file, manifest)
    sizes = manifest.get("files") or {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.is_file()}
    try:
        stored = parse(data)
        for name, tensor in stored.items():
            _check(name, tensor, sizes)
    except BROKEN as error:
        why = "".join(c if c.isprintable() else "?" for c in one_line(error)[:300])  # it may quote the file
        raise CheckpointError(f"{checkpoint}: {file} is broken or not DCP's: {why}") from None
    return stored


def _from_json(data: bytes) -> dict[str, StoredTensor]:
    stored = {}
    for name, fields in json.loads(data).items():
        spec = TensorSpec(_numbers(fields["shape"]), DTYPES[fields["dtype"]])
        stored[name] = StoredTensor(spec, [_chunk(row, spec) for row in fields["chunks"]])
    return stored


def _chunk(row: Mapping[str, Any], spec: TensorSpec) -> Chunk:
    region = TensorSlice(_numbers(row["start"]), _numbers(row["size"]))
    return Chunk(region, row["file"], row["begin"], region.numel * spec.dtype.itemsize, row["crc32"].lower())


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


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check(name: str, stored: StoredTensor, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless chunks hold each element once and their bytes lie within files."""
    shape, itemsize = stored.spec.shape, stored.spec.dtype.itemsize
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError("a tensor in it has a name that no parameter can have")
    for chunk in stored.chunks:
        region = chunk.region
        if not len(region.offsets) == len(region.lengths) == len(shape):
            raise ValueError(f"{name}: one of its chunks has another number of axes")
        if any(a + n > end for a, n, end in zip(region.offsets, region.lengths, shape, strict=True)):
            raise ValueError(f"{name}: one of its chunks lies outside of it")
        if not isinstance(chunk.file, str) or Path(chunk.file).name != chunk.file or chunk.file not in sizes:
            raise ValueError(f"{name}: its file is not one of this checkpoint")
        if not (_is_count(chunk.begin) and _is_count(chunk.nbytes) and region.numel * itemsize <= chunk.nbytes):
            raise ValueError(f"{name}: one of its chunks does not have the size of its bytes")
        if chunk.begin + chunk.nbytes > sizes[chunk.file]:
            raise ValueError(f"{name}: it lies beyond the end of {chunk.file}")
        if chunk.crc32 is not None and len(chunk.crc32) != blocks_in(chunk.nbytes) * DIGITS:
            raise ValueError(f"{name}: one of its chunks has too few or too many checksums")
    regions = [chunk.region for chunk in stored.chunks if chunk.region.numel]
    if sum(region.numel for region in regions) != math.prod(shape) or not _are_disjoint(regions):
        raise ValueError(f"{name}: its chunks do not hold each element once")


def _are_disjoint(regions: list[TensorSlice]) -> bool:
    """Whether no regions overlap; they must come from repeatedly splitting a tensor along axes."""
    groups = [(regions, 0)]
    while groups:
        group, cuts = groups.pop()
        if len(group) > 1:
            axes = range(len(group[0].offsets))
            parts = next((parts for axis in axes if len(parts := _split_along(group, axis)) > 1), None)
            if parts is None or cuts == MAX_CUTS:
                return False
            groups += [(part, cuts + 1) for part in parts]
    return True


def _split_along(regions: list[TensorSlice], axis: int) -> list[list[TensorSlice]]:
    """Split regions into groups that follow one another along an axis without overlapping."""
    groups: list[list[TensorSlice]] = []
    end = -1
    for region in sorted(regions, key=lambda region: region.offsets[axis]):
        if region.offsets[axis] >= end:
            groups.append([])
        groups[-1].append(region)
        end = max(end, region.offsets[axis] + region.lengths[axis])
    return groups
