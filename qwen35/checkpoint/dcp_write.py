"""Writes DCP checkpoints: the shards of all ranks, or converted weights piece by piece."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from io import BufferedRandom
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from qwen35.checkpoint import dcp_folder, folders
from qwen35.checkpoint.dcp_folder import MANIFEST, RELEASE, TENSOR_INDEX
from qwen35.checkpoint.dcp_source import MODEL
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.slices import LocalShard, TensorSlice, TensorSource, TensorSpec, ahead, local_part, pieces
from qwen35.checkpoint.tensor_file import CODES, checksums, raw_bytes
from qwen35.checkpoint.torch_archive import find_tensor
from qwen35.errors import one_line


def local_shards(state: Mapping[str, Tensor]) -> dict[str, LocalShard]:
    """This rank's shards by name, without a copy; a plain tensor is one shard."""
    return {name: LocalShard(*local_part(tensor), tuple(tensor.shape)) for name, tensor in state.items()}


def write_release(
    source: TensorSource,
    folder: str | Path,
    progress: Callable[[int], object] | None = None,
    write_rest: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write `<folder>/release` from a source, in its dtypes, never holding a whole tensor.

    write_rest: as for `write_checkpoint`. Raises CheckpointError.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    parts = [
        (MODEL + name, spec, region)
        for name, spec in source.specs.items()
        for region in pieces(TensorSlice.full(spec.shape), spec.dtype.itemsize)
    ]
    planner = PartPlanner(parts, lambda name, region: source.read(name.removeprefix(MODEL), region))
    try:
        with folders.locked(folders.behind_link(folder / RELEASE), MANIFEST):
            write_checkpoint(folder, None, planner, write_rest, progress=progress)
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return folder / RELEASE


def write_checkpoint(
    folder: Path,
    step: int | None,
    planner: SavePlanner,
    write_rest: Callable[[Path], None] = lambda _: None,
    group: dist.ProcessGroup | None = None,
    world_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write one checkpoint, on all ranks together, and return its folder.

    `write_rest(temporary)` writes each rank's other files. The order is: all files, complete.json,
    the rename, then latest_checkpointed_iteration.txt. If any rank fails, all raise the same
    CheckpointError, and no complete checkpoint is lost.
    """
    checkpoint = folders.behind_link(folder / dcp_folder.checkpoint_name(step))
    is_first = not dist.is_initialized() or dist.get_rank(group) == 0
    temporary = folders.temporary_name(checkpoint)
    failure = f"{checkpoint} cannot be written"
    run_sharing_errors(lambda: folders.begin(checkpoint, MANIFEST) if is_first else None, group, failure)
    try:
        run_sharing_errors(lambda: write_rest(temporary), group, failure)
        _dcp_save(StreamWriter(temporary, progress), planner, group)

        def finish() -> None:
            if is_first:
                content = dcp_folder.manifest_content(temporary, step, world_size)
                folders.commit(temporary, checkpoint, MANIFEST, content)
                dcp_folder.write_latest(folder, step)

        run_sharing_errors(finish, group, failure)
    except BaseException:  # KeyboardInterrupt too: a partial checkpoint is useless, and the disk may be full
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return checkpoint


class PartPlanner(DefaultSavePlanner):
    """Plans to write parts of tensors; if several ranks have the same, DCP picks the writer."""

    def __init__(
        self, parts: Iterable[tuple[str, TensorSpec, TensorSlice]], read: Callable[[str, TensorSlice], Tensor]
    ):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts, self.read = parts, read

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, spec, region in self.parts:
            chunk = ChunkStorageMetadata(Size(region.offsets), Size(region.lengths))
            data = TensorWriteData(chunk, TensorProperties(dtype=spec.dtype), Size(spec.shape))
            items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        return self.read(write_item.index.fqn, TensorSlice(tuple(chunk.offsets), tuple(chunk.sizes)))


def shard_planner(shards: Mapping[str, LocalShard]) -> PartPlanner:
    """Plans to write this rank's shards."""
    parts = [(name, TensorSpec(s.shape, s.values.dtype), s.region) for name, s in shards.items() if s.region.numel]
    return PartPlanner(parts, lambda name, _: shards[name].values)


@dataclass(frozen=True)
class ChunkWriteResult(WriteResult):
    """DCP's record of a written chunk, with what tensors.json says of it and its tensor."""

    chunk: dict[str, Any]
    tensor: dict[str, Any]


class StreamWriter(dcp.FileSystemWriter):
    """Writes DCP's files tensor by tensor; DCP's own holds all tensors of a file in memory."""

    def __init__(self, folder: Path, progress: Callable[[int], object] | None):
        super().__init__(folder)
        self.progress = progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        path = Path(self.path) / f"{plan.storage_data.prefix}0.distcp"
        results: list[WriteResult] = []
        if plan.items:
            # copied from the device by this thread; others read ahead, and compute checksums
            with (
                path.open("w+b") as file,
                closing(ahead(planner.resolve_data, plan.items)) as values,
                closing(ahead(lambda x: (x, checksums(raw_bytes(x))), map(_compact, values), threads=1)) as chunks,
            ):
                for item, (value, crc32) in zip(plan.items, chunks, strict=True):
                    data = item.tensor_data
                    assert data is not None  # always: extras are separate files
                    offset, length, begin = append_tensor(value, file)
                    chunk = {"start": list(data.chunk.offsets), "size": list(data.chunk.sizes), "file": path.name}
                    tensor = {"dtype": CODES[value.dtype], "shape": list(data.size)}
                    stored = item.index, length, _StorageInfo(path.name, offset, length)
                    results.append(ChunkWriteResult(*stored, {**chunk, "begin": begin, "crc32": crc32}, tensor))
                    if self.progress:
                        self.progress(value.nbytes)
                os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write tensors.json, and .metadata beside it; called on rank 0."""
        tensors: dict[str, dict[str, Any]] = {}
        for result in chain.from_iterable(results):
            assert isinstance(result, ChunkWriteResult)
            tensors.setdefault(result.index.fqn, {**result.tensor, "chunks": []})["chunks"].append(result.chunk)
        (Path(self.path) / TENSOR_INDEX).write_text(json.dumps(tensors), encoding="utf-8")
        super().finish(metadata, results)


def _compact(value: Any) -> Tensor:
    """The tensor in host memory, alone in its storage, which torch.save would write as a whole."""
    compact = value.detach().cpu().contiguous()
    return compact.clone() if compact.untyped_storage().nbytes() > compact.nbytes else compact


def append_tensor(tensor: Tensor, file: BufferedRandom) -> tuple[int, int, int]:
    """Append a compact tensor to a file, open as "w+b", in DCP's format. Raises OSError.

    Returns offset and length of the archive around it, and the offset of its bytes.
    """
    offset = file.tell()
    try:
        torch.save(tensor, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # the cause, which torch's zip writer hides
            raise error.__context__ from None
        raise
    file.flush()
    length = file.tell() - offset
    begin = find_tensor(file, offset, length, check=False).storage.begin
    folders.flush_soon(file.fileno(), offset, length)
    return offset, length, begin


def _dcp_save(writer: StreamWriter, planner: SavePlanner, group: dist.ProcessGroup | None) -> None:
    save = partial(dcp.save, {}, storage_writer=writer, planner=planner, process_group=group)
    try:
        if dist.is_initialized():
            save()
            return
        with warnings.catch_warnings():  # only here, where no other thread runs: filters are process-wide
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
            save()
    except CheckpointException as failed:  # which is a BaseException
        errors = [error for error, _ in failed.failures.values()]
        for error in errors:
            if isinstance(error, KeyboardInterrupt):
                raise error from None
        if not all(isinstance(error, (OSError, CheckpointError)) for error in errors):
            raise  # not for the user to fix, e.g. a DataLoader worker was killed; a restart may help
        reasons = "; ".join(sorted({one_line(error) for error in errors}))
        is_read = all(isinstance(error, CheckpointError) for error in errors)  # what is read is at fault
        checkpoint = Path(writer.path).with_suffix("")
        raise CheckpointError(reasons if is_read else f"{checkpoint} cannot be written: {reasons}") from failed


def run_sharing_errors(action: Callable[[], Any], group: dist.ProcessGroup | None, headline: str) -> None:
    """Run an action on every rank; if it fails on any, all raise the same CheckpointError."""
    message: str | None = None
    cause: Exception | None = None
    try:
        action()
    except CheckpointError as error:
        message, cause = str(error), error
    except (OSError, TypeError) as error:  # the headline names the file
        reason = error.strerror if isinstance(error, OSError) else None
        message, cause = f"{headline}: {reason or one_line(error)}", error
    messages = [message]
    if dist.is_initialized():
        messages = [None] * dist.get_world_size(group)
        dist.all_gather_object(messages, message, group=group)
    if failures := [m for m in dict.fromkeys(messages) if m]:
        raise CheckpointError("; ".join(failures)) from cause
