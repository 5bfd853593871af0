"""Writes converted weights as a DCP checkpoint: one process, several threads, piece by piece."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Size
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from qwen35.checkpoint import folders
from qwen35.checkpoint.dcp_folder import MANIFEST, RELEASE, manifest_content, write_latest
from qwen35.checkpoint.dcp_item import append_tensor
from qwen35.checkpoint.dcp_source import MODEL
from qwen35.checkpoint.dcp_write import StreamWriter
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.slices import TensorSlice, TensorSource, pieces
from qwen35.checkpoint.threads import THREADS, share_out
from qwen35.errors import one_line

ONE_FILE_BYTES = 256 * 2**20  # up to this, one thread writes one file, so that its bytes are reproducible


def write_release(source: TensorSource, folder: str | Path, progress: Callable[[int], object] | None = None) -> Path:
    """Write `<folder>/release` from a source, in its dtypes, never holding a whole tensor.

    Each thread writes one file; complete.json and the rename come last. Raises CheckpointError.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    content: dict[str, Any] = {}
    try:
        with folders.new_folder(folder / RELEASE, MANIFEST, content) as temporary:
            _write(source, temporary, progress)
            content |= manifest_content(temporary, None)
        write_latest(folder, None)
    except OSError as error:
        raise CheckpointError(f"{folder / RELEASE} cannot be written: {one_line(error)}") from error
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return folder / RELEASE


def _write(source: TensorSource, folder: Path, progress: Callable[[int], object] | None) -> None:
    plan = {
        name: list(pieces(TensorSlice.full(spec.shape), spec.dtype.itemsize)) or [TensorSlice.full(spec.shape)]
        for name, spec in source.specs.items()
    }

    def write(number: int, parts: Iterator[tuple[str, TensorSlice]]) -> list[WriteResult]:
        path = folder / f"__0_{number}.distcp"
        written: list[WriteResult] = []
        with path.open("w+b") as file:
            for name, region in parts:
                values = source.read(name, region)
                result = append_tensor(values, MetadataIndex(MODEL + name, Size(region.offsets)), path, file)
                folders.flush_soon(file.fileno(), result.storage_data.offset, result.size_in_bytes)
                written.append(result)
                if progress:
                    progress(values.nbytes)
            folders.flush(path)
        return written

    parts = [(name, region) for name, regions in plan.items() for region in regions]
    is_small = sum(spec.nbytes for spec in source.specs.values()) <= ONE_FILE_BYTES
    written = share_out(parts, write, 1 if is_small else THREADS)
    described: dict[str, STORAGE_TYPES] = {
        MODEL + name: TensorStorageMetadata(
            TensorProperties(dtype=source.specs[name].dtype),
            Size(source.specs[name].shape),
            [ChunkStorageMetadata(Size(region.offsets), Size(region.lengths)) for region in regions],
        )
        for name, regions in plan.items()
    }
    StreamWriter(folder).finish(Metadata(described), written)
