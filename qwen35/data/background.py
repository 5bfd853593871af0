"""Worker processes that do jobs in order, ahead of who needs them: tokenise, decode, convert."""

import gc
import os
import signal
from collections.abc import Generator, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qwen35.batch import PackedBatch, map_fields
from qwen35.errors import SettingError, UserError, one_line
from qwen35.processes import die_with, obey

MIN_SHARED_MEMORY = 1 << 20  # bytes that must be free before workers are started


def background_loader(
    dataset: Any, sampler: Iterable[Any], workers: int, pin: bool, persistent: bool = False
) -> "DataLoader[Any]":
    """Yields dataset[job] for each job of `sampler`, in order.

    pin: a thread page-locks the batches. persistent: workers stay for further iterations.
    Raises SettingError if /dev/shm is full.
    """
    if workers:
        shared(torch.empty(MIN_SHARED_MEMORY, dtype=torch.uint8))  # without it the DataLoader fails with a traceback
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_to_shared_memory if workers else lambda batch: batch,
        worker_init_fn=partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # so that opening a loader does not advance the global one
        multiprocessing_context="fork" if workers else None,  # workers share the tokens
        pin_memory=pin,
        persistent_workers=persistent and workers > 0,
    )


def results(dataset: Any, jobs: Iterable[Any], workers: int, advice: str) -> Generator[Any, None, None]:
    """dataset[job] of each job, in order; no workers: here. Raises those that are UserErrors.

    advice: how to use fewer workers.
    """
    try:
        for result in background_loader(dataset, jobs, workers, pin=False):
            if isinstance(result, UserError):
                raise result
            yield result
    except RuntimeError as error:  # torch raises it wherever this process is
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a worker process died before its work was done; if memory ran out, use fewer: {advice}"
        ) from None


def _to_shared_memory(batch: Any) -> Any:
    """Here, because the queue would find a full /dev/shm in a thread, and the parent would wait."""
    try:
        return map_fields(batch, shared) if isinstance(batch, PackedBatch) else batch
    except SettingError as error:
        return error


def shared(tensor: Tensor) -> Tensor:
    """The tensor, moved to shared memory, of which containers get 64 MB by default.

    Raises SettingError if /dev/shm is full.
    """
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        raise SettingError(
            f"/dev/shm has no room for {tensor.nbytes:,} bytes of a batch ({one_line(error)}); start the container with"
            " --shm-size=16g or --ipc=host, or set data.dataloader_param.num_workers: 0"
        ) from None


def _start_worker(parent: int, _: int) -> None:
    die_with(parent)
    gc.freeze()  # what the parent made stays shared memory: collecting garbage would write to all of it
    # Signals to the whole job are for the parent, which needs batches until it has saved. A worker
    # ends with its parent, or on the SIGTERM that the parent sends when Python exits.
    obey(parent)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
