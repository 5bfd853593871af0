"""Saves a run's checkpoints, in the background if asked for. It knows no settings and no data."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from qwen35.checkpoint.dcp import training_state, write_shards
from qwen35.checkpoint.dcp_folder import keep_newest, write_best
from qwen35.checkpoint.dcp_write import local_shards, run_sharing_errors
from qwen35.checkpoint.slices import LocalShard
from qwen35.device import host_buffer, host_group, is_peer_failure, synchronize
from qwen35.errors import complain


class Saver:
    """Saves model and optimizer into a folder; all ranks make the same calls.

    background: a thread of each rank writes from a copy in host memory, and training waits only for
    the copy. The threads have a process group of their own, so their collectives never mix with
    those of training. One save runs at a time, and reuses the memory of the previous copy.

    limit: how many complete checkpoints are kept; older ones go once a new one is complete.

    Used as a context manager, it waits for a running save however the block ends.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: Optimizer | None,
        background: bool,
        limit: int | None = None,
        timeout: float = 1800.0,  # seconds that background saves wait for the slowest rank
    ):
        self.folder, self.model, self.optimizer, self.limit = folder, model, optimizer, limit
        self.background = background
        self.saves = 0  # except the final one, after which no step follows
        self.stalled = 0.0  # seconds that training waited for these saves
        self._group = host_group(timeout) if background and dist.is_initialized() else None
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0
        self._host_copies: dict[str, Tensor] = {}
        self._jobs: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def check(self) -> None:
        """Call after each step: raises the error of a background save; allocates the copy."""
        while self._jobs and self._jobs[0].done():
            self._jobs.pop(0).result()
        if self.background and not self._host_copies:
            for name, shard in local_shards(training_state(self.model, self.optimizer)).items():
                self._host_copies[name] = host_buffer(shard.values)

    def finish(self) -> float:
        """Wait until nothing is being saved. Returns the seconds; raises the error of a save."""
        start = time.perf_counter()
        running = [job for job in self._jobs if not job.done()]
        wait(running)
        self.check()
        return time.perf_counter() - start if running else 0.0

    def save(
        self,
        step: int,
        extra: Mapping[str, Any],
        rank_extra: Mapping[str, Any],
        is_last: bool = False,
        is_best: bool = False,
    ) -> float:
        """Save `iter_<step>`. Returns the seconds that it waited for the previous save.

        is_last: save in the foreground and without a copy, since no step follows. is_best: name it
        as the best validation's. Raises CheckpointError.
        """
        start = time.perf_counter()
        waited = self.finish()
        shards = local_shards(training_state(self.model, self.optimizer))
        if self.background and not is_last:
            copies = self._copy_to_host(shards)
            self._jobs.append(self._thread.submit(self._write, step, copies, extra, rank_extra, is_best))
        else:
            self._write(step, shards, extra, rank_extra, is_best)
        if not is_last:
            self.saves, self.stalled = self.saves + 1, self.stalled + time.perf_counter() - start
        return waited

    def run_after(self, action: Callable[[], None]) -> None:
        """Run an action on this rank after the running save; at once if there is none."""
        if self._jobs:
            self._jobs.append(self._thread.submit(action))
        else:
            action()

    def _copy_to_host(self, shards: Mapping[str, LocalShard]) -> dict[str, LocalShard]:
        copies = {}
        for name, shard in shards.items():
            if name not in self._host_copies:  # optimizer state that this step created
                self._host_copies[name] = host_buffer(shard.values)
            copies[name] = replace(shard, values=self._host_copies[name].copy_(shard.values, non_blocking=True))
        synchronize({shard.values.device for shard in shards.values()})
        return copies

    def _write(
        self,
        step: int,
        shards: Mapping[str, LocalShard],
        extra: Mapping[str, Any],
        rank_extra: Mapping[str, Any],
        is_best: bool,
    ) -> None:
        write_shards(self.folder, step, shards, extra, rank_extra, self._group)
        if is_best:
            name = (lambda: write_best(self.folder, step)) if self._is_first else (lambda: None)
            run_sharing_errors(name, self._group, f"{self.folder}: the best checkpoint cannot be named")
        if (limit := self.limit) is not None:
            remove = (lambda: keep_newest(self.folder, limit)) if self._is_first else (lambda: None)
            run_sharing_errors(remove, self._group, f"{self.folder}: older checkpoints cannot be removed")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait(self._jobs)  # an error that stops the run must not cost the checkpoint as well
        self._thread.shutdown(wait=False)
        if error is None:
            self.check()
        elif self._is_first and not _lost_a_rank(error):  # the rank may be gone for the save's error, and reports it
            failures = filter(None, (job.exception() for job in self._jobs))
            for failure in failures:  # which nothing else would report
                if not _lost_a_rank(failure):  # that is what stops the run, and is reported as such
                    complain(failure)


def _lost_a_rank(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and is_peer_failure(error)
