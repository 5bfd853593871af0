"""What a DCP checkpoint holds: each tensor's shape and dtype, and in which file its chunks lie, where, with which checksums.

It is written as JSON, tensors.json, beside DCP's own description, .metadata: a pickle, which torch's tools read. This program
reads it in checkpoints that have no tensors.json, as they were once written.
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
MAX_CUTS = 32  # of a tensor into chunks: more of them are nobody's layout, and would take long to look at
MAX_NAME = 500  # characters
BROKEN = (pickle.UnpicklingError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Chunk:
    region: TensorSlice
    file: str
    begin: int  # of its bytes; without checksums: of the archive in which they are
    nbytes: int
    crc32: str | None


@dataclass(frozen=True)
class StoredTensor:
    spec: TensorSpec
    chunks: list[Chunk]


def describe(metadata: Metadata, results: Iterable[WriteResult]) -> str:
    """The text of tensors.json. Raises CheckpointError if a part of a tensor was not written."""
    found, tensors = {one.index: one for one in results if isinstance(one, ChunkWriteResult)}, {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # there are no others: extras are files of their own
        rows = []
        for chunk in entry.chunks:
            one = found.get(MetadataIndex(name, chunk.offsets))
            if one is None:
                raise CheckpointError(f"a part of {name} was not written")
            place = {"file": one.storage_data.relative_path, "begin": one.begin, "crc32": one.crc32}
            rows.append({"start": list(chunk.offsets), "size": list(chunk.sizes), **place})
        tensors[name] = {"dtype": CODES[entry.properties.dtype], "shape": list(entry.size), "chunks": rows}
    return json.dumps(tensors)


def read_index(checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """By the tensors' names. Raises CheckpointError for what no checkpoint could be: see `_check`."""
    file, parse = (TENSOR_INDEX, _from_json) if manifest.get("format") == FORMAT else (METADATA, _from_metadata)
    data = read_file(checkpoint, file, manifest)
    sizes = manifest.get("files") or {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.is_file()}
    try:
        stored = parse(data)
        for name, one in stored.items():
            _check(name, one, sizes)
    except BROKEN as error:
        why = "".join(c if c.isprintable() else "?" for c in one_line(error)[:300])  # which may quote the file
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
    places = {}
    for index, info in pairs(root["storage_data"]):
        key = fields_of(index, MODULE + "metadata.MetadataIndex")
        start = _size(key["offset"]) if key.get("offset") is not None else ()  # of what is no tensor
        places[str(key["fqn"]), start] = fields_of(info, MODULE + "filesystem._StorageInfo")
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
            at = fields_of(chunk, MODULE + "metadata.ChunkStorageMetadata")
            region = TensorSlice(_size(at["offsets"]), _size(at["sizes"]))
            info = places.get((name, region.offsets))
            if info is None:
                raise ValueError(f"{name}: a part of it is missing")
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
        raise ValueError("a shape or place is not made of whole numbers")
    return tuple(values)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check(name: str, stored: StoredTensor, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless the chunks lie within the tensor and hold each element once, and their bytes within files."""
    shape, itemsize = stored.spec.shape, stored.spec.dtype.itemsize
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError("a tensor in it has a name that no parameter can have")
    for chunk in stored.chunks:
        region = chunk.region
        if not len(region.offsets) == len(region.lengths) == len(shape):
            raise ValueError(f"{name}: a chunk of it has other axes")
        if any(a + n > end for a, n, end in zip(region.offsets, region.lengths, shape, strict=True)):
            raise ValueError(f"{name}: a chunk of it lies outside of it")
        if not isinstance(chunk.file, str) or Path(chunk.file).name != chunk.file or chunk.file not in sizes:
            raise ValueError(f"{name}: it lies in no file of this checkpoint")
        if not (_is_count(chunk.begin) and _is_count(chunk.nbytes) and region.numel * itemsize <= chunk.nbytes):
            raise ValueError(f"{name}: a chunk of it has another size than its bytes")
        if chunk.begin + chunk.nbytes > sizes[chunk.file]:
            raise ValueError(f"{name}: it lies beyond the end of {chunk.file}")
        if chunk.crc32 is not None and len(chunk.crc32) != blocks_in(chunk.nbytes) * DIGITS:
            raise ValueError(f"{name}: a chunk of it has too few checksums or too many")
    regions = [chunk.region for chunk in stored.chunks if chunk.region.numel]
    if sum(region.numel for region in regions) != math.prod(shape) or not _are_disjoint(regions):
        raise ValueError(f"{name}: its chunks do not hold each element once")


def _are_disjoint(regions: list[TensorSlice]) -> bool:
    """Whether no two regions have an element in common, for regions that come about by cutting: again and again, across."""
    left = [(regions, 0)]
    while left:
        group, cuts = left.pop()
        if len(group) > 1:
            axes = range(len(group[0].offsets))
            parts = next((parts for axis in axes if len(parts := _split_along(group, axis)) > 1), None)
            if parts is None or cuts == MAX_CUTS:
                return False
            left += [(part, cuts + 1) for part in parts]
    return True


def _split_along(regions: list[TensorSlice], axis: int) -> list[list[TensorSlice]]:
    """Boxes in groups that lie one behind the other along an axis."""
    groups: list[list[TensorSlice]] = []
    end = -1
    for region in sorted(regions, key=lambda region: region.offsets[axis]):
        if region.offsets[axis] >= end:
            groups.append([])
        groups[-1].append(region)
        end = max(end, region.offsets[axis] + region.lengths[axis])
    return groups
