"""Writes Hugging Face checkpoints like a source folder, and verifies the files."""

import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.checkpoint import folders
from qwen35.checkpoint.errors import CheckpointError, Mismatch
from qwen35.checkpoint.hf_names import EMBEDDING, HEAD, TensorMapping, first_on_disk, mappings_of
from qwen35.checkpoint.hf_read import OTHER_WEIGHTS, WEIGHTS_INDEX, HFFolder
from qwen35.checkpoint.slices import TensorSlice, TensorSource, ahead, in_range, pieces
from qwen35.checkpoint.tensor_file import Entry, raw_bytes, read_header, read_slice
from qwen35.errors import one_line

EXPORT_MANIFEST = ".qwen35.json"  # marks the folders written here, which may therefore be replaced

OF_TOKENIZER = """tokenizer.json tokenizer_config.json vocab.json merges.txt added_tokens.json special_tokens_map.json
    chat_template.json chat_template.jinja processor_config.json preprocessor_config.json
    video_preprocessor_config.json""".split()

Fetch = Callable[[str, TensorSlice], Tensor]  # (name on disk, region) -> values of any float dtype


@dataclass(frozen=True)
class WriteSummary:
    tensors: int
    nbytes: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.nbytes:,} bytes, {self.folder}"


def save_hf(
    values: TensorSource,
    source_folder: str | Path,
    out: str | Path,
    progress: Callable[[int], object] | None = None,
    tokenizer: Path | None = None,
    checkpoint: Mapping[str, str] | None = None,
) -> WriteSummary:
    """Write a model's state like a source folder: its names, shapes, dtypes, files and index.

    checkpoint: says which one of a run it is, and is kept in the export's manifest.

    Values are cast to the source's dtypes. Two kinds of tensors may be absent from the state:
    `mtp.*`, which is copied from the source, and an `lm_head.weight` stored despite tied weights,
    for which the embedding is written. Config, tokenizer, processor, chat template and other small
    files are copied; those of tokenizer and processors from the folder `tokenizer` if it is given.

    Weights are written piece by piece and read back. `out` is replaced if it is empty or was
    written by this program. Raises CheckpointError, and leaves nothing half-written.
    """
    source, out = HFFolder(source_folder), Path(out)
    folders.check_disjoint(source.folder, out)
    shapes = {name: spec.shape for name, spec in values.specs.items()}
    held = check_exportable(shapes, source, f"the weights do not fit {source.folder}")
    folders.check_free_space(out, sum((source.folder / file).stat().st_size for file in source.files))

    def fetch(disk_name: str, region: TensorSlice) -> Tensor:
        if disk_name not in held:
            return source.read(disk_name, region)
        name, mapping = held[disk_name]
        return values.read(name, mapping.to_model(region))

    content: dict[str, Any] = {"checkpoint": checkpoint} if checkpoint else {}
    with folders.new_folder(out, EXPORT_MANIFEST, content) as temporary:
        try:
            files = (_write_like(source, file, temporary / file, fetch, progress) for file in source.files)
            for _ in ahead(_read_back, files, threads=1):  # while the next file is written
                pass
        except OSError as error:
            raise CheckpointError(f"{temporary}: cannot be written: {one_line(error)}") from None
        others = {path: path.relative_to(source.folder) for path in _other_files(source.folder, source.has_index)}
        if tokenizer is not None:
            theirs = {p: p.relative_to(tokenizer) for p in _other_files(tokenizer, False) if p.name in OF_TOKENIZER}
            others = {p: name for p, name in others.items() if p.name not in OF_TOKENIZER} | theirs
        for path, name in others.items():
            _copy(path, temporary / name)
        specs = HFFolder(temporary).specs  # index and headers can be read back
        total = sum(spec.nbytes for spec in specs.values())
        content |= {"tensors": len(specs), "bytes": total, "files": list(folders.file_sizes(temporary))}
    return WriteSummary(len(specs), total, out)


def _write_like(
    source: HFFolder, file: str, out: Path, fetch: Fetch, progress: Callable[[int], object] | None
) -> tuple[Path, dict[str, Entry], list[tuple[str, TensorSlice, int]]]:
    """Write one safetensors file with the header of the source's, for `_read_back`."""
    entries = source.files[file]
    # trained values are fp32, so pieces are sized for fp32
    parts = [
        (name, region)
        for name, entry in entries.items()
        for region in pieces(TensorSlice.full(entry.spec.shape), max(entry.spec.dtype.itemsize, torch.float32.itemsize))
    ]

    def prepare(part: tuple[str, TensorSlice]) -> tuple[str, TensorSlice, memoryview, int]:
        name, region = part
        dtype = entries[name].spec.dtype
        data = raw_bytes(in_range(fetch(name, region), dtype, name).to(dtype).contiguous())
        return name, region, data, zlib.crc32(data)

    written = []
    with (source.folder / file).open("rb") as original, out.open("wb") as copy, closing(ahead(prepare, parts)) as ready:
        copy.write(original.read(min((entry.begin for entry in entries.values()), default=-1)))
        for name, region, data, crc32 in ready:
            position = copy.tell()
            copy.write(data)
            folders.flush_soon(copy.fileno(), position, data.nbytes)
            written.append((name, region, crc32))
            if progress:
                progress(data.nbytes)
    return out, entries, written


def _read_back(file: tuple[Path, dict[str, Entry], list[tuple[str, TensorSlice, int]]]) -> None:
    """Flush a file, and compare its header and each piece with what was written."""
    path, entries, written = file
    folders.flush(path)
    if read_header(path) != entries:
        raise CheckpointError(f"{path}: the header read back differs from the source's")
    for name, region, crc32 in written:
        if zlib.crc32(raw_bytes(read_slice(path, entries[name], region))) != crc32:
            raise CheckpointError(f"{path}: {name} read back differs from what was written")


def check_exportable(
    shapes: Mapping[str, Sequence[int]], source: HFFolder, headline: str
) -> dict[str, tuple[str, TensorMapping]]:
    """Raises CheckpointError if a state of these shapes could not be written like the source.

    It must have every tensor of the source, except those that may be copied, and no others. Returns
    by name on disk the parameter of which a region is written there; all else is copied.
    """
    held = {m.disk_name: (n, m) for n, shape in shapes.items() for m in mappings_of(n, shape, source.specs)}
    tied = HEAD in source.specs and HEAD not in shapes and source.is_tied
    may_be_copied = {n for n in source.specs if n.startswith("mtp.") or (tied and n == HEAD)}
    wanted = {n: spec.shape for n, spec in source.specs.items() if n in held or n not in may_be_copied}
    Mismatch.between({n: m.disk_shape for n, (_, m) in held.items()}, wanted).raise_if_any(headline)
    _other_files(source.folder, source.has_index)
    if tied:
        held[HEAD] = held[first_on_disk(EMBEDDING, source.specs)]
    return held


def _other_files(folder: Path, has_index: bool) -> list[Path]:
    """The files to copy: all except weights, hidden files and an index that the weights do not use.

    Raises CheckpointError for a link out of the folder, which could copy any file of this machine.
    Only the hub's cache may have such links, from snapshots/… to blobs.
    """
    root, files = folder.resolve(), []
    hub_blobs = [root.parent.parent / "blobs"] * (root.parent.name == "snapshots")
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_weights = path.suffix in {".safetensors", *OTHER_WEIGHTS} or path.name.endswith(".bin.index.json")
        if any(part.startswith(".") for part in relative.parts) or is_weights or not path.is_file():
            continue
        if str(relative) == WEIGHTS_INDEX and not has_index:
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
