"""Measure the network before a run of several nodes: `python -m qwen35.preflight CONFIG`.

The ranks compare their nodes (tools/consistency.py), and check and time collectives in the process
group in which they will train.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist

import kernels
from qwen35.config.schema import Settings
from qwen35.console import outlive_readers
from qwen35.device import end_process_group, init_process, model_name, synchronize
from qwen35.errors import UserError
from qwen35.log import logger
from qwen35.rank import leave, run_rank
from qwen35.tools.compilation import check_compilers
from qwen35.tools.consistency import compare_nodes, ranks_here

SIZES = [1 << n for n in (20, 22, 24, 26)]  # bytes: from one that is quick to one that saturates a fast network
MAX_SECONDS = 0.1  # of an all-reduce; beyond it the larger sizes are skipped


class PreflightError(UserError):
    """The ranks do not compute the same, or not on the same devices."""


def slowest(collective: Callable[[], object], device: torch.device) -> float:
    """Seconds that the slowest rank takes for a collective that all begin together."""
    dist.barrier()
    begin = time.perf_counter()
    collective()
    synchronize([device])
    seconds = torch.tensor([time.perf_counter() - begin], device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def collectives(device: torch.device, sizes: Sequence[int]) -> Iterator[tuple[str, int, float, float]]:
    """Yields name, bytes, seconds of the slowest rank (best of three), bytes/s sent by a rank.

    The bytes sent are the least that the collective needs, as in make rehearse.
    """
    world = dist.get_world_size()
    for size in sizes:
        whole, result = (torch.zeros(size // 4 // world * world, device=device) for _ in range(2))
        own, total = whole[: len(whole) // world], partial(dist.all_reduce, whole)
        calls: dict[str, tuple[Callable[[], object], int]] = {
            "all-gather": (partial(dist.all_gather_into_tensor, result, own), 1),
            "reduce-scatter": (partial(dist.reduce_scatter_tensor, own, result), 1),
            "all-reduce": (total, 2),
            "all-to-all": (partial(dist.all_to_all_single, result, whole), 1),
        }
        for name, (call, times) in calls.items():
            call()  # opens the connections
            seconds = min(slowest(call, device) for _ in range(3))
            yield name, size, seconds, times * (world - 1) / world * size / seconds


def measure(device: torch.device, log: Callable[[str], None]) -> None:
    """Check all-reduces over all ranks, of growing size; rank 0 logs the speed of the largest.

    Takes milliseconds in one machine, at most 0.3 s on slow networks, where only small sizes are
    tried. Raises PreflightError on a wrong sum, or where the ranks compute on different devices.
    """
    world, local = dist.get_world_size(), ranks_here()
    kinds: list[str] = [""] * world
    dist.all_gather_object(kinds, model_name(device))
    if other := next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None):
        raise PreflightError(f"rank {other} computes on {kinds[other]}, rank 0 on {kinds[0]}")
    for size in SIZES:
        numbers = torch.ones(size // 4, device=device)
        dist.all_reduce(numbers)  # opens the connections
        wrong = numbers[numbers != world]
        if len(wrong):
            raise PreflightError(
                f"rank {dist.get_rank()}: an all-reduce of {world} ones gives {float(wrong[0])} somewhere"
            )
        took = slowest(partial(dist.all_reduce, numbers), device)
        if took > MAX_SECONDS:
            break
    rate = 2 * (world - 1) / world * size / took / 1e6  # MB/s: the least that each rank sends, and receives
    nodes = f"{world // local} node{'s' * (world > local)}"
    if dist.get_rank() == 0:
        log(
            f"all-reduce over {world} ranks of {nodes}: {size >> 20} MiB in {took * 1e3:.1f} ms, {rate:,.0f} MB/s a rank"
        )


def check_nodes(settings: Settings, device: torch.device) -> None:
    """What a run of several nodes does first. Raises NodesError, PreflightError."""
    if dist.get_world_size() > ranks_here():
        compare_nodes(settings, settings.training.timeout)
        measure(device, logger.info)


def preflight(settings: Settings) -> None:
    device = init_process(settings.training.timeout)
    compare_nodes(settings, settings.training.timeout)
    if kernels.triton_ops(kernels.select(device.type, settings.model.kernels)):
        check_compilers()
    measure(device, lambda line: print(f"{line}\npreflight: all is well", flush=True))
    end_process_group()


if __name__ == "__main__":
    outlive_readers()
    leave(run_rank(preflight, "qwen35.preflight", __doc__, None, kernels.KernelError))
