"""Writing DCP checkpoints, all ranks together."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from qwen35.checkpoint import folders
from qwen35.checkpoint.dcp_folder import MARKER, checkpoint_name, marker_content, write_latest
from qwen35.checkpoint.dcp_item import save_tensor
from qwen35.checkpoint.errors import CheckpointError


def write_checkpoint(
    folder: Path,
    step: int | None,
    planner: SavePlanner,
    state: Mapping[str, Tensor],
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
        metadata = _dcp_save(dict(state), temporary, planner, group)

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


def _dcp_save(
    state: dict[str, Tensor], folder: Path, planner: SavePlanner, group: dist.ProcessGroup | None
) -> Metadata:
    writer = _StreamWriter(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
            return dcp.save(state, storage_writer=writer, planner=planner, process_group=group)
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
