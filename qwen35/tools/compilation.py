"""A run's Triton kernels, compiled by one process of each machine before the others use them."""

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
from qwen35.tools.doctor.machine import Machine
from qwen35.tools.doctor.triton import triton
from qwen35.triton_cache import cache_folder, compiling

if TYPE_CHECKING:
    from kernels.triton.tiles import Tiles

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
A_KERNEL = 1800.0  # seconds that compiling one may take, whatever a step may
OTHERS = 6 * 3600.0  # that others wait for all of them: who hangs in one is ended before
SLOW = 2.0  # seconds without a line of progress


class CompilationError(UserError):
    """The kernels of a run cannot be compiled here, or not alike on all machines."""


def check_compilers() -> None:
    """What triton-ascend, where it is installed, needs of this machine. Raises CompilationError."""
    if missing := [f for f in triton(Machine()) if f.status == "wrong"]:
        raise CompilationError("; ".join(f"{f.subject}: {f.fact} -> {f.todo}" for f in missing))


def compiled(
    settings: Settings, text: TextConfig, device: torch.device, heartbeat: Heartbeat, say: Callable[[str], object]
) -> kernels.Kernels:
    """The kernels of a run, those of Triton compiled, with tiles that fit and are the same on all ranks, which all call it.

    Local rank 0 of each machine compiles, in the cache that all processes there use, whichever run they belong to; the others
    wait as long as that takes. Raises CompilationError, CacheError, KernelError.
    """
    chosen = kernels.select(device.type, settings.model.kernels)
    if not kernels.triton_ops(chosen):
        return chosen
    from kernels.triton.first_run import with_tiles

    # the ranks' own group would give up before; this one is made first, while all are here
    group = host_group(OTHERS) if dist.get_world_size() > 1 else None
    tiles = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tiles, _ = compile_here(settings, text, chosen, device, heartbeat, say)
    found = [tiles]
    if group is not None:
        heartbeat.at("waiting for the local ranks 0 to compile the Triton kernels", OTHERS)
        found *= dist.get_world_size()
        dist.all_gather_object(found, tiles, group)
        dist.destroy_process_group(group)
    return with_tiles(chosen, agreed(found))


def agreed(found: "list[Tiles | None]") -> "Tiles":
    """Of all ranks; None: of one that has compiled nothing. Raises CompilationError."""
    of_rank = {rank: tiles for rank, tiles in enumerate(found) if tiles is not None}
    if other := next((rank for rank, tiles in of_rank.items() if tiles != of_rank[0]), None):
        raise CompilationError(
            f"the Triton kernels would round differently: rank {other} has {of_rank[other]}, rank 0 {of_rank[0]}; install the"
            " same CANN on all machines"
        )
    return of_rank[0]


class _Progress:
    """A line every few seconds, and what a watchdog is to know at any time."""

    def __init__(self, count: int, heartbeat: Heartbeat, say: Callable[[str], object]):
        self._count, self._heartbeat, self._say = count, heartbeat, say
        self._begun: set[str] = set()
        self._start, self._told = time.monotonic(), -SLOW

    def begins(self, kernel: str) -> None:
        self._begun.add(kernel)
        self._at(f"compiling Triton kernels: {len(self._begun)} of {self._count}", A_KERNEL, kernel)

    def waits(self, process: str) -> None:
        self._at(f"waiting for process {process.strip()}, which compiles Triton kernels too", OTHERS)

    def _at(self, what: str, patience: float, more: str = "") -> None:
        now = time.monotonic()
        self._heartbeat.at(f"{what} ({more})" if more else what, patience)
        if now - self._told >= SLOW:
            self._say(f"{what}, {now - self._start:.0f} s")
            self._told = now


def compile_here(
    settings: Settings,
    text: TextConfig,
    chosen: kernels.Kernels,
    device: torch.device,
    heartbeat: Heartbeat,
    say: Callable[[str], object],
) -> "tuple[Tiles, dict[str, float]]":
    """Alone in this machine's cache, with lines of progress. Raises as `compiled`."""
    from kernels.triton.first_run import KERNEL_COUNTS, Layer, TooLargeError, compile_kernels

    check_compilers()
    share = settings.parallel.ulysses_parallel_size
    heads = text.linear_num_key_heads // share, text.linear_num_value_heads // share
    layer = Layer(*heads, text.linear_key_head_dim, text.linear_value_head_dim, DTYPES[settings.training.dtype])
    progress = _Progress(sum(KERNEL_COUNTS[op] for op in kernels.triton_ops(chosen)), heartbeat, say)
    folder, start = cache_folder(), time.monotonic()
    try:
        with compiling(folder, progress.waits):
            tiles, seconds = compile_kernels(chosen, layer, device, progress.begins, say)
    except TooLargeError as error:
        kernel, why = error.args
        raise CompilationError(
            f"{kernel}: {why}, and no tile is smaller; model.kernels has others, as native"
        ) from error
    say(f"Triton kernels: {len(seconds)} ready in {time.monotonic() - start:.0f} s, in {folder}")
    return tiles, seconds


def show(config: str, overrides: Sequence[str]) -> int:
    """Compile a recipe's kernels on the first device, without its weights, and print a table of them. Returns the exit code."""
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
