"""Before a run of several machines, how fast they talk to each other: `python -m qwen35.preflight CONFIG`.

That the machines agree is settled before, by their launchers (launch/rendezvous.py); here the processes of
the run are there, and the group in which they will train.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist

import kernels
from qwen35.config.schema import Settings
from qwen35.console import outlive_readers
from qwen35.device import init_process, model_name, synchronize
from qwen35.errors import UserError
from qwen35.rank import leave, run_rank
from qwen35.tools.compilation import check_compilers

SIZES = [1 << n for n in (20, 22, 24, 26)]  # bytes: from what is over at once to what fills a fast network
ENOUGH = 0.1  # seconds that an all-reduce may take until the larger ones are left out


class PreflightError(UserError):
    """The processes do not compute together as they should."""


def ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def slowest(collective: Callable[[], object], device: torch.device) -> float:
    """Seconds of the rank that takes longest over a collective which all of them begin together."""
    dist.barrier()
    begin = time.perf_counter()
    collective()
    synchronize([device])
    seconds = torch.tensor([time.perf_counter() - begin], device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def collectives(device: torch.device, sizes: Sequence[int]) -> Iterator[tuple[str, int, float, float]]:
    """-> name, bytes of the whole, seconds of the slowest rank (the best of three), bytes a second that each rank sends.

    What a rank sends at the least is counted, as make rehearse does it.
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
            call()  # the first one makes connections
            seconds = min(slowest(call, device) for _ in range(3))
            yield name, size, seconds, times * (world - 1) / world * size / seconds


def measure(device: torch.device, say: Callable[[str], None]) -> None:
    """An all-reduce over all ranks, larger and larger: its result is checked, its speed told in a line of rank 0.

    A few milliseconds in one machine; 0.3 s at most on slow networks, where the smaller size is what can be had. Raises
    PreflightError on a rank that gets a wrong sum, or where the ranks compute on different devices.
    """
    world, own = dist.get_world_size(), ranks_here()
    kinds: list[str] = [""] * world
    dist.all_gather_object(kinds, model_name(device))
    if other := next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None):
        raise PreflightError(f"rank {other} computes on {kinds[other]}, rank 0 on {kinds[0]}")
    for size in SIZES:
        numbers = torch.ones(size // 4, device=device)
        dist.all_reduce(numbers)  # the first one makes connections
        wrong = numbers[numbers != world]
        if len(wrong):
            raise PreflightError(
                f"rank {dist.get_rank()}: an all-reduce of {world} ones gives {float(wrong[0])} somewhere"
            )
        took = slowest(partial(dist.all_reduce, numbers), device)
        if took > ENOUGH:
            break
    through = 2 * (world - 1) / world * size / took / 1e6  # what each rank sends, and receives, at the least
    machines = f"{world // own} machine{'s' * (world > own)}"
    if dist.get_rank() == 0:
        say(
            f"all-reduce over {world} ranks of {machines}: {size >> 20} MiB in {took * 1e3:.1f} ms, {through:,.0f} MB/s a rank"
        )


def preflight(settings: Settings) -> None:
    device = init_process()
    if kernels.triton_ops(kernels.select(device.type, settings.model.kernels)):
        check_compilers()
    measure(device, lambda line: print(f"{line}\npreflight: all is well", flush=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    outlive_readers()
    leave(run_rank(preflight, "qwen35.preflight", __doc__, None, kernels.KernelError))
