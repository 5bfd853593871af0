"""Writes DCP checkpoints; all ranks take part."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from qwen35.checkpoint import folders
from qwen35.checkpoint.dcp_folder import MANIFEST, TENSOR_INDEX, checkpoint_name, manifest_content, write_latest
from qwen35.checkpoint.dcp_index import describe
from qwen35.checkpoint.dcp_item import append_tensor
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.slices import TensorSlice, TensorSpec, local_part


@dataclass(frozen=True)
class LocalShard:
    """This rank's part of a tensor."""

    values: Tensor
    region: TensorSlice  # of the global tensor
    shape: tuple[int, ...]  # of the global tensor


def local_shards(state: Mapping[str, Tensor]) -> dict[str, LocalShard]:
    """This rank's shards by name, without a copy; a plain tensor is one shard."""
    return {name: LocalShard(*local_part(tensor), tuple(tensor.shape)) for name, tensor in state.items()}


def write_checkpoint(
    folder: Path,
    step: int | None,
    planner: SavePlanner,
    write_rest: Callable[[Path], None],
    group: dist.ProcessGroup | None = None,
    world_size: int = 1,
) -> Path:
    """Write one checkpoint, on all ranks together, and return its folder.

    `write_rest(temporary)` writes each rank's other files. The order is: all files, complete.json,
    the rename, then latest_checkpointed_iteration.txt. If any rank fails, all raise the same
    CheckpointError, and no complete checkpoint is lost.
    """
    checkpoint = folder / checkpoint_name(step)
    is_first = not dist.is_initialized() or dist.get_rank(group) == 0
    temporary = checkpoint.with_name(checkpoint.name + ".tmp")
    is_new = not folder.exists()
    failure = f"{checkpoint} cannot be written"
    run_sharing_errors(lambda: folders.begin(checkpoint, MANIFEST) if is_first else None, group, failure)
    try:
        run_sharing_errors(lambda: write_rest(temporary), group, failure)
        _dcp_save(temporary, planner, group)

        def finish() -> None:
            if is_first:
                folders.commit(temporary, checkpoint, MANIFEST, manifest_content(temporary, step, world_size))
                write_latest(folder, step)

        run_sharing_errors(finish, group, failure)
    except BaseException:  # KeyboardInterrupt too: a partial checkpoint is useless, and the disk may be full
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
        raise
    return checkpoint


class ShardPlanner(DefaultSavePlanner):
    """Plans to write this rank's shards; if several ranks have the same, DCP picks the writer."""

    def __init__(self, shards: Mapping[str, LocalShard]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shards = shards

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                _item(name, TensorSpec(shard.shape, shard.values.dtype), shard.region)
                for name, shard in self.shards.items()
                if shard.region.numel
            ]
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.shards[write_item.index.fqn].values


def _item(name: str, spec: TensorSpec, region: TensorSlice) -> WriteItem:
    data = TensorWriteData(
        ChunkStorageMetadata(Size(region.offsets), Size(region.lengths)),
        TensorProperties(dtype=spec.dtype),
        Size(spec.shape),
    )
    return WriteItem(MetadataIndex(name, Size(region.offsets)), WriteItemType.SHARD, tensor_data=data)


class StreamWriter(dcp.FileSystemWriter):
    """Writes DCP's files tensor by tensor; DCP's own holds all tensors of a file in memory."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        path = Path(self.path) / f"{plan.storage_data.prefix}0.distcp"
        results: list[WriteResult] = []
        if plan.items:
            with path.open("w+b") as file:
                for item in plan.items:
                    value = planner.resolve_data(item)
                    assert isinstance(value, Tensor)  # always: extras are separate files
                    results.append(append_tensor(value.detach().cpu(), item.index, path, file))
                os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write tensors.json, and .metadata beside it; called on rank 0."""
        (Path(self.path) / TENSOR_INDEX).write_text(describe(metadata, chain.from_iterable(results)), encoding="utf-8")
        super().finish(metadata, results)


def _dcp_save(folder: Path, planner: SavePlanner, group: dist.ProcessGroup | None) -> None:
    save = partial(dcp.save, {}, storage_writer=StreamWriter(folder), planner=planner, process_group=group)
    try:
        if dist.is_initialized():
            save()
            return
        with warnings.catch_warnings():  # only here, where no other thread runs: filters are process-wide
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
            save()
    except CheckpointException as failed:  # which is a BaseException
        errors = [error for error, _ in failed.failures.values()]
        if not all(isinstance(error, (OSError, CheckpointError)) for error in errors):
            raise  # not for the user to fix, e.g. a DataLoader worker was killed; a restart may help
        reasons = sorted({_reason(error) for error in errors})
        raise CheckpointError(f"{folder.with_suffix('')} cannot be written: {'; '.join(reasons)}") from failed


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__


def run_sharing_errors(action: Callable[[], Any], group: dist.ProcessGroup | None, headline: str) -> None:
    """Run an action on every rank; if it fails on any, all raise the same CheckpointError."""
    message: str | None = None
    cause: Exception | None = None
    try:
        action()
    except CheckpointError as error:
        message, cause = str(error), error
    except (OSError, TypeError) as error:
        message, cause = f"{headline}: {_reason(error)}", error
    messages = [message]
    if dist.is_initialized():
        messages = [None] * dist.get_world_size(group)
        dist.all_gather_object(messages, message, group=group)
    if failures := [m for m in dict.fromkeys(messages) if m]:
        raise CheckpointError("; ".join(failures)) from cause
