"""Writes Hugging Face checkpoints, like a source folder or from scratch, and verifies the files."""

import json
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.checkpoint import folders
from qwen35.checkpoint.errors import CheckpointError, Mismatch
from qwen35.checkpoint.hf_names import EMBEDDING, HEAD, Layout, disk_spec, mapping_of, mappings_of, published_dtype
from qwen35.checkpoint.hf_read import OTHER_WEIGHTS, WEIGHTS_INDEX, HFFolder
from qwen35.checkpoint.safetensors_file import Header, make_header, raw_bytes, read_header, read_slice, write_at
from qwen35.checkpoint.slices import MemorySource, TensorSlice, TensorSource, TensorSpec, pieces
from qwen35.checkpoint.threads import share_out
from qwen35.errors import one_line

EXPORT_MANIFEST = ".qwen35.json"  # marks the folders written here, which may therefore be replaced

Fetch = Callable[[str, TensorSlice], Tensor]  # (name on disk, region) -> values of any float dtype
Progress = Callable[[int], object]  # called with the bytes of each piece


@dataclass(frozen=True)
class WriteSummary:
    tensors: int
    nbytes: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.nbytes:,} bytes, {self.folder}"


def save_hf(
    state: TensorSource | Mapping[str, Tensor],
    source_folder: str | Path,
    out: str | Path,
    progress: Progress | None = None,
) -> WriteSummary:
    """Write a model's state like a source folder: its names, shapes, dtypes, files and index.

    Values are cast to the source's dtypes. Two kinds of tensors may be absent from the state:
    `mtp.*`, which is copied from the source, and an `lm_head.weight` stored despite tied weights,
    for which the embedding is written. Config, tokenizer, processor, chat template and other small
    files are copied.

    `out` is replaced if it is empty or was written by this program. Raises CheckpointError, and
    leaves nothing half-written.
    """
    source, out = HFFolder(source_folder), Path(out)
    folders.check_disjoint(source.folder, out)
    values = MemorySource(state) if isinstance(state, Mapping) else state
    shapes = {name: spec.shape for name, spec in values.specs.items()}
    tied = check_exportable(shapes, source, f"the weights do not fit {source.folder}")
    _check_free_space(out, sum(header.nbytes for header in source.files.values()))

    def fetch(disk_name: str, region: TensorSlice) -> Tensor:
        name, mapping = mapping_of(disk_name, source.specs[disk_name].shape)
        if tied and disk_name == HEAD:
            name = EMBEDDING
        return values.read(name, mapping.to_model(region)) if name in values.specs else source.read(disk_name, region)

    content: dict[str, Any] = {}
    with folders.new_folder(out, EXPORT_MANIFEST, content) as temporary:
        _write_files(temporary, source.files, fetch, progress)
        for path in _other_files(source):
            _copy(path, temporary / path.relative_to(source.folder))
        _check_folder(HFFolder(temporary), source.files)
        total = sum(spec.nbytes for spec in source.specs.values())
        content |= {"tensors": len(source.specs), "bytes": total, "files": list(folders.file_sizes(temporary))}
    return WriteSummary(content["tensors"], content["bytes"], out)


def write_hf(
    state: TensorSource | Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: str | Path,
    layout: Layout = "hub",
    shard_size: int = 4 * 2**30,
    dtype_of: Callable[[str], torch.dtype] = published_dtype,
    texts: Mapping[str, str] | None = None,
) -> WriteSummary:
    """Write a fresh checkpoint of a model's state: weights named like the hub's, index, config.

    `dtype_of` maps a name on disk to its dtype, by default the published one. A file of weights
    holds up to `shard_size` bytes, or a single larger tensor. `texts` are further files by name.
    `folder` is replaced if it is empty or was written by this program. Raises CheckpointError.
    """
    values, folder = MemorySource(state) if isinstance(state, Mapping) else state, Path(folder)
    mappings = {m.disk_name: (n, m) for n, s in values.specs.items() for m in mappings_of(n, s.shape, layout)}
    specs = disk_spec({name: spec.shape for name, spec in values.specs.items()}, layout, dtype_of)
    shards = _fill_shards(specs, shard_size)
    files = {f"model.safetensors-{k:05}-of-{len(shards):05}.safetensors": names for k, names in enumerate(shards, 1)}
    headers = {file: make_header({name: specs[name] for name in names}) for file, names in files.items()}

    def fetch(disk_name: str, region: TensorSlice) -> Tensor:
        name, mapping = mappings[disk_name]
        return values.read(name, mapping.to_model(region))

    content: dict[str, Any] = {}
    with folders.new_folder(folder, EXPORT_MANIFEST, content) as temporary:
        _write_files(temporary, headers, fetch, None)
        total = sum(spec.nbytes for spec in specs.values())
        file_of = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        _write_json(temporary / WEIGHTS_INDEX, index)
        _write_json(temporary / "config.json", config)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        _check_folder(HFFolder(temporary), headers)
        content |= {"tensors": len(specs), "bytes": total, "files": list(folders.file_sizes(temporary))}
    return WriteSummary(len(specs), total, folder)


def _fill_shards(specs: Mapping[str, TensorSpec], shard_size: int) -> list[list[str]]:
    """Distribute names over files by falling size, as in the published checkpoints."""
    shards: list[list[str]] = []
    room = 0
    for name in sorted(specs, key=lambda n: (-specs[n].nbytes, n)):
        if not shards or specs[name].nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= specs[name].nbytes
    return shards


class _ShardFile:
    """A safetensors file that several threads write, each a piece of a tensor at a time."""

    def __init__(self, path: Path, header: Header):
        self.path, self.header = path, header
        self.pieces: list[tuple[str, TensorSlice, int]] = []  # name, piece, its first byte in the file
        for name, entry in header.entries.items():
            position, itemsize = entry.begin, entry.spec.dtype.itemsize
            # trained values are fp32, so pieces are sized for fp32
            for region in pieces(TensorSlice.full(entry.spec.shape), max(itemsize, torch.float32.itemsize)):
                self.pieces.append((name, region, position))
                position += region.numel * itemsize
        self.sums: dict[int, int] = {}  # first byte of a piece -> checksum of the piece
        self.left, self.lock = len(self.pieces), threading.Lock()
        path.write_bytes(header.raw)

    def write(self, name: str, position: int, values: Tensor) -> int:
        """Write a piece, and check the file if it was the last one. Returns the piece's bytes."""
        data = raw_bytes(values.to(self.header.entries[name].spec.dtype).contiguous())
        self.sums[position] = zlib.crc32(data)
        with self.lock:  # the kernel writes to a file one call at a time anyway
            write_at(self.path, position, data)
            self.left -= 1
            is_last = self.left == 0
        if is_last:
            self.check()
        return data.nbytes

    def check(self) -> None:
        """Flush the file and read it back. Raises CheckpointError if a byte differs."""
        folders.flush(self.path)
        entries = read_header(self.path).entries
        for name, region, position in self.pieces:
            if zlib.crc32(raw_bytes(read_slice(self.path, entries[name], region))) != self.sums[position]:
                raise CheckpointError(f"{self.path}: {name} read back differs from what was written")


def _write_files(folder: Path, headers: Mapping[str, Header], fetch: Fetch, progress: Progress | None) -> None:
    """Write safetensors files; the thread that writes the last piece of one reads it back."""

    def write(_: int, items: Iterator[tuple[_ShardFile, tuple[str, TensorSlice, int]]]) -> None:
        for file, (name, region, position) in items:
            nbytes = file.write(name, position, fetch(name, region))
            if progress:
                progress(nbytes)

    try:
        files = [_ShardFile(folder / name, header) for name, header in headers.items()]
        share_out([(file, piece) for file in files for piece in file.pieces], write)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {one_line(error)}") from None


def _check_folder(written: HFFolder, headers: Mapping[str, Header]) -> None:
    """Raises CheckpointError unless index, files and headers, read back, are as intended."""
    if {file: header.raw for file, header in written.files.items()} != {f: h.raw for f, h in headers.items()}:
        raise CheckpointError(f"{written.folder}: files or headers read back differ from those written")


def check_exportable(shapes: Mapping[str, Sequence[int]], source: HFFolder, headline: str) -> bool:
    """Raises CheckpointError if a state of these shapes could not be written like the source.

    It must have every tensor of the source, except those that may be copied, and no others. Returns
    whether the stored head is the embedding.
    """
    mismatch, covered = Mismatch(), set()
    tied = HEAD in source.specs and HEAD not in shapes and source.is_tied
    for name, shape in shapes.items():
        for mapping in mappings_of(name, shape, source.specs):
            covered.add(mapping.disk_name)
            if mapping.disk_name not in source.specs:
                mismatch.surplus.append(mapping.disk_name)
            elif source.specs[mapping.disk_name].shape != mapping.disk_shape:
                mismatch.misshapen[mapping.disk_name] = (mapping.disk_shape, source.specs[mapping.disk_name].shape)
    copied = [n for n in source.specs if n.startswith("mtp.") or (tied and n == HEAD)]
    mismatch.missing = [n for n in source.specs if n not in covered and n not in copied]
    mismatch.raise_if_any(headline)
    _other_files(source)
    return tied


def _check_free_space(out: Path, needed: int) -> None:
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(f"{out}: the export takes {needed:,} bytes, and {free:,} are free on that disk")


def _other_files(source: HFFolder) -> list[Path]:
    """The files to copy: all except weights, hidden files and an index that the weights do not use.

    Raises CheckpointError for a link out of the folder, which could copy any file of this machine.
    Only the hub's cache may have such links, from snapshots/… to blobs.
    """
    root, files = source.folder.resolve(), []
    hub_blobs = [root.parent.parent / "blobs"] * (root.parent.name == "snapshots")
    for path in sorted(source.folder.rglob("*")):
        relative = path.relative_to(source.folder)
        is_weights = path.suffix in {".safetensors", *OTHER_WEIGHTS} or path.name.endswith(".bin.index.json")
        if any(part.startswith(".") for part in relative.parts) or is_weights or not path.is_file():
            continue
        if str(relative) == WEIGHTS_INDEX and not source.has_index:
            continue
        target = path.resolve()
        if not any(target.is_relative_to(allowed) for allowed in (root, *hub_blobs)):
            raise CheckpointError(
                f"{path}: a link out of the model folder, to {target}, which an export would copy; replace it by the file"
            )
        files.append(path)
    return files


def _copy(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(path, copy)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be copied to {copy}: {error.strerror}") from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
