"""Collectives over all local ranks, by kind and size; that what they bring is right, the runs beside one rank show."""

import sys
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist

from accept.task import Task
from qwen35.device import has_own_memory, init_process
from qwen35.errors import USER_ERRORS
from qwen35.launch.launcher import run as launch
from qwen35.launch.rendezvous import free_port
from qwen35.preflight import collectives, measure
from qwen35.rank import leave, record_failure
from rehearse.rates import SLOW

MIB = 1 << 20
OF_FSDP = ("all-gather", "reduce-scatter")


def check(task: Task) -> None:
    """Starts the ranks. Where one of them dies, its launcher has said why, and this process ends."""
    if task.ranks == 1:
        task.add("collectives", "told", "there is one device")
        return
    port = free_port(is_alone=True)
    place = Namespace(nnodes=1, node_rank=0, nproc_per_node=task.ranks, master_addr="localhost", master_port=port)
    command = [sys.executable, "-m", "accept.ranks", str(task.folder), *["--small"] * task.small]
    if launch(command, place):
        sys.exit(1)


def rank(task: Task) -> None:
    device = init_process(120)
    measure(device, lambda line: task.add("preflight", "told", line))
    sizes = [MIB] if task.small else [n * MIB for n in ((1, 16, 64, 256) if has_own_memory(device) else (1, 16))]
    for name, size, seconds, rate in collectives(device, sizes):
        what, found = f"{name}, {size // MIB} MiB", f"{seconds * 1e3:.2f} ms, {rate / 1e9:.3g} GB/s a rank"
        if dist.get_rank() == 0 and size == sizes[-1]:
            of_rates = ("within", rate) if name in OF_FSDP else ()
            task.measure(device, what, found, rate / SLOW.within, f"{SLOW.within / 1e9:.0f} GB/s", *of_rates)
        elif dist.get_rank() == 0:
            task.add(what, "told", found)


if __name__ == "__main__":
    try:
        rank(Task(Path(sys.argv[1]), "--small" in sys.argv))
    except BaseException as error:
        if record_failure(error, is_user_error=isinstance(error, USER_ERRORS)):
            leave(1)
        raise
    leave(0)
