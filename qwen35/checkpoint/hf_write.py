"""Writing Hugging Face checkpoints: one like its source, or a fresh one. Each ends by reading itself back."""

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

EXPORT_MANIFEST = ".qwen35.json"  # lies in folders that we wrote, and may replace

Fetch = Callable[[str, TensorSlice], Tensor]  # (name on disk, part) -> values of any float dtype
Progress = Callable[[int], object]  # is told the bytes of each piece


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
    """Write `state` (the model's names) as a folder with exactly the source's keys, shapes, dtypes, files and index.

    Values are cast to the source's dtypes. Of the tensors that the state does not hold, `mtp.*` is copied from the
    source and a `lm_head.weight` stored despite tied weights is the state's embedding; that any other is not held is
    an error. Configuration, tokenizer, processor, chat template and whatever else is no weight come along.

    `out` is replaced if it is empty or was written by us. Raises CheckpointError, and leaves nothing half-written.
    """
    source, out = HFFolder(source_folder), Path(out)
    folders.check_disjoint(source.folder, out)
    values = MemorySource(state) if isinstance(state, Mapping) else state
    shapes = {name: spec.shape for name, spec in values.specs.items()}
    tied = check_exportable(shapes, source, f"the weights do not fit {source.folder}")
    _check_free_space(out, sum(header.nbytes for header in source.files.values()))

    def fetch(name: str, part: TensorSlice) -> Tensor:
        owner, mapping = mapping_of(name, source.specs[name].shape)
        if tied and name == HEAD:
            owner = EMBEDDING
        return values.read(owner, mapping.to_model(part)) if owner in values.specs else source.read(name, part)

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
    """Write a fresh checkpoint of a model's state: safetensors files named as the hub's, index, config.json.

    `texts` are further files by name. `dtype_of` maps a name on disk to its dtype, by default the published one. Files of
    weights hold up to `shard_size` bytes, or one tensor. `folder` is replaced if it is empty or was written by us.
    """
    values, folder = MemorySource(state) if isinstance(state, Mapping) else state, Path(folder)
    mappings = {p.disk_name: (n, p) for n, s in values.specs.items() for p in mappings_of(n, s.shape, layout)}
    specs = disk_spec({name: spec.shape for name, spec in values.specs.items()}, layout, dtype_of)
    shards = _fill_shards(specs, shard_size)
    files = {f"model.safetensors-{k:05}-of-{len(shards):05}.safetensors": names for k, names in enumerate(shards, 1)}
    headers = {file: make_header({name: specs[name] for name in names}) for file, names in files.items()}

    def fetch(name: str, part: TensorSlice) -> Tensor:
        owner, mapping = mappings[name]
        return values.read(owner, mapping.to_model(part))

    content: dict[str, Any] = {}
    with folders.new_folder(folder, EXPORT_MANIFEST, content) as temporary:
        _write_files(temporary, headers, fetch, None)
        total = sum(spec.nbytes for spec in specs.values())
        file_of = {name: file for file, names in files.items() for name in names}
        _write_json(
            temporary / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        )
        _write_json(temporary / "config.json", config)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        _check_folder(HFFolder(temporary), headers)
        content |= {"tensors": len(specs), "bytes": total, "files": list(folders.file_sizes(temporary))}
    return WriteSummary(len(specs), total, folder)


def _fill_shards(specs: Mapping[str, TensorSpec], shard_size: int) -> list[list[str]]:
    """Names by falling size, as the published files have them: a layer is spread over files."""
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
    """A safetensors file while several threads write it, each a piece of a tensor at a time."""

    def __init__(self, path: Path, header: Header):
        self.path, self.header = path, header
        self.parts: list[tuple[str, TensorSlice, int]] = []  # name, piece of it, its first byte in the file
        for name, entry in header.entries.items():
            position, itemsize = entry.begin, entry.spec.dtype.itemsize
            for region in pieces(
                TensorSlice.full(entry.spec.shape), max(itemsize, torch.float32.itemsize)
            ):  # as it is trained
                self.parts.append((name, region, position))
                position += region.numel * itemsize
        self.sums: dict[int, int] = {}  # first byte of a piece -> checksum of the piece
        self.left, self.lock = len(self.parts), threading.Lock()
        path.write_bytes(header.raw)

    def write(self, name: str, position: int, values: Tensor) -> int:
        """Write a piece, and check the file if it was the last. Returns how many bytes it had."""
        data = raw_bytes(values.to(self.header.entries[name].spec.dtype).contiguous())
        self.sums[position] = zlib.crc32(data)
        with self.lock:  # the kernel lets one write to a file at a time
            write_at(self.path, position, data)
            self.left -= 1
            is_last = self.left == 0
        if is_last:
            self.check()
        return data.nbytes

    def check(self) -> None:
        """Have the disk hold the file, and read it back: every byte is what was meant to be written."""
        folders.flush(self.path)
        entries = read_header(self.path).entries
        for name, region, position in self.parts:
            if zlib.crc32(raw_bytes(read_slice(self.path, entries[name], region))) != self.sums[position]:
                raise CheckpointError(f"{self.path}: {name} read back differs from what was written")


def _write_files(folder: Path, headers: Mapping[str, Header], fetch: Fetch, progress: Progress | None) -> None:
    """Write safetensors files. Each is read back by the thread that ends it, while the others write the next."""

    def write(_: int, parts: Iterator[tuple[_ShardFile, tuple[str, TensorSlice, int]]]) -> None:
        for file, (name, region, position) in parts:
            nbytes = file.write(name, position, fetch(name, region))
            if progress:
                progress(nbytes)

    try:
        files = [_ShardFile(folder / name, header) for name, header in headers.items()]
        share_out([(file, part) for file in files for part in file.parts], write)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {one_line(error)}") from None


def _check_folder(written: HFFolder, headers: Mapping[str, Header]) -> None:
    """The index, the files and their headers, read back, are what was meant to be written."""
    if {file: header.raw for file, header in written.files.items()} != {f: h.raw for f, h in headers.items()}:
        raise CheckpointError(f"{written.folder}: files or headers read back differ from those written")


def check_exportable(shapes: Mapping[str, Sequence[int]], source: HFFolder, headline: str) -> bool:
    """Raises CheckpointError if a state of these names and shapes could not be written like the source.

    The state has every tensor of the source but those that may be copied, and none besides. Returns whether the head that is
    stored is the embedding.
    """
    wrong, covered = Mismatch(), set()
    tied = HEAD in source.specs and HEAD not in shapes and source.is_tied
    for name, shape in shapes.items():
        for mapping in mappings_of(name, shape, source.specs):
            covered.add(mapping.disk_name)
            if mapping.disk_name not in source.specs:
                wrong.surplus.append(mapping.disk_name)
            elif source.specs[mapping.disk_name].shape != mapping.disk_shape:
                wrong.misshapen[mapping.disk_name] = (mapping.disk_shape, source.specs[mapping.disk_name].shape)
    copied = [n for n in source.specs if n.startswith("mtp.") or (tied and n == HEAD)]
    wrong.missing = [n for n in source.specs if n not in covered and n not in copied]
    wrong.raise_if_any(headline)
    _other_files(source)
    return tied


def _check_free_space(out: Path, needed: int) -> None:
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(f"{out}: the export takes {needed:,} bytes, and {free:,} are free on that disk")


def _other_files(source: HFFolder) -> list[Path]:
    """What comes along: all files but weights, hidden files and an index that is not the weights'.

    Raises CheckpointError for a link out of the folder, which may name any file of this machine. In a hub's cache every file
    is a link from snapshots/… to blobs.
    """
    root, found = source.folder.resolve(), []
    cache = [root.parent.parent / "blobs"] * (root.parent.name == "snapshots")
    for path in sorted(source.folder.rglob("*")):
        relative = path.relative_to(source.folder)
        weights = path.suffix in {".safetensors", *OTHER_WEIGHTS} or path.name.endswith(".bin.index.json")
        if any(part.startswith(".") for part in relative.parts) or weights or not path.is_file():
            continue
        if str(relative) == WEIGHTS_INDEX and not source.has_index:
            continue
        target = path.resolve()
        if not any(target.is_relative_to(allowed) for allowed in (root, *cache)):
            raise CheckpointError(
                f"{path}: a link out of the model folder, to {target}, which an export would copy; put the file itself there"
            )
        found.append(path)
    return found


def _copy(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(path, copy)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be copied to {copy}: {error.strerror}") from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
