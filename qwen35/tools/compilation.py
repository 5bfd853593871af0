"""A run's Triton kernels are compiled by one process of each node before the others use them."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

import kernels
from qwen35.config.load import load_settings
from qwen35.config.schema import Settings
from qwen35.device import host_group, set_up_device
from qwen35.errors import USER_ERRORS, UserError, complain
from qwen35.heartbeat import Heartbeat
from qwen35.model import TextConfig, load_config
from qwen35.tools.doctor.host import Machine
from qwen35.tools.triton import triton
from qwen35.triton_cache import cache_folder, compiling

if TYPE_CHECKING:
    from kernels.triton.tiles import Tiles

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNEL_TIMEOUT = 1800.0  # seconds to compile one kernel, whatever the timeout of a step
WAIT_TIMEOUT = 6 * 3600.0  # seconds to wait for all kernels: a compiler that hangs is stopped before
PROGRESS_INTERVAL = 2.0  # seconds between two lines of progress


class CompilationError(UserError):
    """The kernels of a run cannot be compiled on this node, or differ between nodes."""


def check_compilers() -> None:
    """Check what an installed triton-ascend needs on this node. Raises CompilationError."""
    if missing := [f for f in triton(Machine()) if f.status == "wrong"]:
        raise CompilationError("; ".join(f"{f.subject}: {f.fact} -> {f.todo}" for f in missing))


def compiled(
    settings: Settings, text: TextConfig, device: torch.device, heartbeat: Heartbeat, log: Callable[[str], object]
) -> kernels.Kernels:
    """The kernels of a run, with Triton's compiled for tiles that fit, the same on all ranks.

    All ranks call it. Local rank 0 of each node compiles into the cache that all processes of the
    node share, those of other runs included; the others wait. Raises CompilationError, CacheError,
    KernelError.
    """
    chosen = kernels.select(device.type, settings.model.kernels)
    if not kernels.triton_ops(chosen):
        return chosen
    from kernels.triton.first_run import with_tiles

    # a group with a long timeout of its own, made now, while all ranks are at the same point
    group = host_group(WAIT_TIMEOUT) if dist.get_world_size() > 1 else None
    tiles = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tiles, _ = compile_here(settings, text, chosen, device, heartbeat, log)
    found = [tiles]
    if group is not None:
        heartbeat.at("waiting for local rank 0 of each node to compile the Triton kernels", WAIT_TIMEOUT)
        found *= dist.get_world_size()
        dist.all_gather_object(found, tiles, group)
    return with_tiles(chosen, common_tiles(found))


def common_tiles(found: "list[Tiles | None]") -> "Tiles":
    """The tiles of all ranks, None for one that compiled nothing. Raises CompilationError."""
    by_rank = {rank: tiles for rank, tiles in enumerate(found) if tiles is not None}
    if other := next((rank for rank, tiles in by_rank.items() if tiles != by_rank[0]), None):
        raise CompilationError(
            f"the Triton kernels would round differently: rank {other} has {by_rank[other]}, rank 0 {by_rank[0]}; install"
            " the same CANN on all nodes"
        )
    return by_rank[0]


class _Progress:
    """Logs a line every few seconds, and tells the watchdog what is compiled."""

    def __init__(self, count: int, heartbeat: Heartbeat, log: Callable[[str], object]):
        self._count, self._heartbeat, self._log = count, heartbeat, log
        self._started: set[str] = set()
        self._start, self._last_line = time.monotonic(), -PROGRESS_INTERVAL

    def compiling(self, kernel: str) -> None:
        self._started.add(kernel)
        self._at(f"compiling Triton kernels: {len(self._started)} of {self._count}", KERNEL_TIMEOUT, kernel)

    def waiting(self, process: str) -> None:
        self._at(f"waiting for process {process.strip()}, which is also compiling Triton kernels", WAIT_TIMEOUT)

    def _at(self, what: str, timeout: float, kernel: str = "") -> None:
        now = time.monotonic()
        self._heartbeat.at(f"{what} ({kernel})" if kernel else what, timeout)
        if now - self._last_line >= PROGRESS_INTERVAL:
            self._log(f"{what}, {now - self._start:.0f} s")
            self._last_line = now


def compile_here(
    settings: Settings,
    text: TextConfig,
    chosen: kernels.Kernels,
    device: torch.device,
    heartbeat: Heartbeat,
    log: Callable[[str], object],
) -> "tuple[Tiles, dict[str, float]]":
    """Compile under the lock of this node's cache, and log progress. Raises as `compiled`."""
    from kernels.triton.first_run import KERNEL_COUNTS, Layer, TooLargeError, compile_kernels

    check_compilers()
    share = settings.parallel.ulysses_parallel_size
    heads = text.linear_num_key_heads // share, text.linear_num_value_heads // share
    layer = Layer(*heads, text.linear_key_head_dim, text.linear_value_head_dim, DTYPES[settings.training.dtype])
    progress = _Progress(sum(KERNEL_COUNTS[op] for op in kernels.triton_ops(chosen)), heartbeat, log)
    folder, start = cache_folder(), time.monotonic()
    try:
        with compiling(folder, progress.waiting):
            tiles, seconds = compile_kernels(chosen, layer, device, progress.compiling, log)
    except TooLargeError as error:
        kernel, why = error.args
        raise CompilationError(
            f"{kernel}: {why}, and there is no smaller tile; choose another in model.kernels, such as native"
        ) from error
    log(f"Triton kernels: {len(seconds)} ready in {time.monotonic() - start:.0f} s, in {folder}")
    return tiles, seconds


def show(config: str, overrides: Sequence[str]) -> int:
    """Compile a recipe's kernels on the first device, print a table, return the exit status."""
    try:
        settings, device = load_settings(config, overrides), set_up_device()
        chosen = kernels.select(device.type, settings.model.kernels)
        if not kernels.triton_ops(chosen):
            return 0
        text = load_config(settings.model.model_name_or_path).text
        tiles, seconds = compile_here(settings, text, chosen, device, Heartbeat(), partial(print, flush=True))
    except (*USER_ERRORS, kernels.KernelError) as error:
        return complain(error)
    print(
        "\n".join(
            [f"{'kernel':28}seconds  tile", *(f"{k:28}{s:7.1f}  {tiles.describe(k)}" for k, s in seconds.items())]
        )
    )
    return 0
