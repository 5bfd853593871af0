"""Writing DCP checkpoints, all ranks together."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from qwen35.checkpoint import folders
from qwen35.checkpoint.boxes import Box, TensorSpec, local_part
from qwen35.checkpoint.dcp_folder import MARKER, checkpoint_name, marker_content, write_latest
from qwen35.checkpoint.dcp_item import save_tensor
from qwen35.checkpoint.errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor: the elements `box` of one of `shape`."""

    values: Tensor
    box: Box
    shape: tuple[int, ...]


def own_parts(state: Mapping[str, Tensor]) -> dict[str, Part]:
    """The parts of this rank by name, the tensors' own memory; a plain tensor is its own whole."""
    return {name: Part(*local_part(tensor), tuple(tensor.shape)) for name, tensor in state.items()}


def write_checkpoint(
    folder: Path,
    step: int | None,
    planner: SavePlanner,
    write_rest: Callable[[Path], None],
    group: dist.ProcessGroup | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write one checkpoint, all ranks in step, and return its folder.

    `write_rest(temporary)` writes each rank's other files. The order: every file, complete.json, the rename, then
    latest_checkpointed_iteration.txt. If any rank fails, all raise the same CheckpointError, and nothing that is
    whole is lost.
    """
    checkpoint = folder / checkpoint_name(step)
    is_first = not dist.is_initialized() or dist.get_rank(group) == 0
    temporary = checkpoint.with_name(checkpoint.name + ".tmp")
    is_new = not folder.exists()
    together(lambda: folders.begin(checkpoint, MARKER) if is_first else None, group, f"{checkpoint} cannot be written")
    try:
        together(lambda: write_rest(temporary), group, f"{checkpoint} cannot be written")
        metadata = _dcp_save(temporary, planner, group)

        def finish() -> None:
            if is_first:
                _check_all_written(metadata, temporary)
                content = marker_content(temporary, step=step, **(facts or {}))
                folders.commit(temporary, checkpoint, MARKER, content)
                write_latest(folder, step)

        together(finish, group, f"{checkpoint} cannot be written")
    except BaseException:  # KeyboardInterrupt too: a full disk should not stay full of what cannot be used
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
        raise
    return checkpoint


class PartsPlanner(DefaultSavePlanner):
    """Plans the parts that this rank holds. What several ranks hold, one of them writes (DefaultSavePlanner's doing)."""

    def __init__(self, parts: Mapping[str, Part]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                _item(name, TensorSpec(part.shape, part.values.dtype), part.box)
                for name, part in self.parts.items()
                if part.box.numel
            ]
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.parts[write_item.index.fqn].values


def _item(name: str, spec: TensorSpec, box: Box) -> WriteItem:
    data = TensorWriteData(
        ChunkStorageMetadata(Size(box.start), Size(box.size)), TensorProperties(dtype=spec.dtype), Size(spec.shape)
    )
    return WriteItem(MetadataIndex(name, Size(box.start)), WriteItemType.SHARD, tensor_data=data)


class _StreamWriter(dcp.FileSystemWriter):
    """DCP's own files, written tensor by tensor: DCP's writer keeps every tensor until the end of the file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        if plan.items:
            with (Path(self.path) / name).open("wb") as file:
                for item in plan.items:
                    begin = file.tell()
                    value = planner.resolve_data(item)
                    assert isinstance(value, Tensor)  # there are no other items: extras are files of their own
                    save_tensor(value.detach().cpu(), file)
                    length = file.tell() - begin
                    results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
                file.flush()
                os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _dcp_save(folder: Path, planner: SavePlanner, group: dist.ProcessGroup | None) -> Metadata:
    save = partial(dcp.save, {}, storage_writer=_StreamWriter(folder), planner=planner, process_group=group)
    try:
        if dist.is_initialized():
            return save()
        with warnings.catch_warnings():  # not beside other threads: the filters are the whole process's
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
            return save()
    except CheckpointException as failed:  # a BaseException
        told = sorted({_words(error) for error, _ in failed.failures.values()})
        raise CheckpointError(f"{folder.with_suffix('')} cannot be written: {'; '.join(told)}") from failed


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__


def _check_all_written(metadata: Metadata, folder: Path) -> None:
    stored = metadata.storage_data
    for name, entry in metadata.state_dict_metadata.items():
        chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
        for chunk in chunks:
            if MetadataIndex(name, chunk.offsets) not in stored:
                raise CheckpointError(f"{folder}: a part of {name} was not written")


def together(action: Callable[[], Any], group: dist.ProcessGroup | None, what: str) -> None:
    """Run an action on every rank; if any fails, all raise the same CheckpointError: none waits for one that is gone."""
    message: str | None = None
    cause: Exception | None = None
    try:
        action()
    except CheckpointError as error:
        message, cause = str(error), error
    except (OSError, TypeError) as error:
        message, cause = f"{what}: {_words(error)}", error
    messages = [message]
    if dist.is_initialized():
        messages = [None] * dist.get_world_size(group)
        dist.all_gather_object(messages, message, group=group)
    told = [m for m in dict.fromkeys(messages) if m]
    if told:
        raise CheckpointError("; ".join(told)) from cause
