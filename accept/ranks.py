"""The speed of collectives over all local ranks. Their results are checked by accept/runs.py."""

import os
import sys
from argparse import Namespace

import torch.distributed as dist

from accept.machine import RECIPE
from accept.task import Task
from qwen35.device import init_process, is_apart
from qwen35.launch.launcher import run as launch
from qwen35.launch.rendezvous import free_port
from qwen35.preflight import collectives, measure
from qwen35.rank import FAILURE_FILE, leave, run_rank

MIB = 1 << 20
OF_FSDP = ("all-gather", "reduce-scatter")


def check(task: Task) -> None:
    """Starts the ranks, each of which calls this again. The launcher prints why a rank failed."""
    if FAILURE_FILE in os.environ:
        leave(run_rank(lambda settings: measure_all(task), "accept", None, [RECIPE]))
    if task.ranks == 1:
        task.add("collectives", "info", "there is one device")
        return
    port = free_port(is_alone=True)
    node = Namespace(nnodes=1, node_rank=0, nproc_per_node=task.ranks, master_addr="localhost", master_port=port)
    command = [sys.executable, "-m", "accept", "--check", "ranks", str(task.folder), *["--small"] * task.small]
    if launch(command, node):
        sys.exit(1)


def measure_all(task: Task) -> None:
    device = init_process(120)
    measure(device, lambda line: task.add("preflight", "info", line))
    sizes = [MIB] if task.small else [n * MIB for n in ((1, 16, 64, 256) if is_apart(device) else (1, 16))]
    for name, size, seconds, rate in collectives(device, sizes):
        what, found = f"{name}, {size // MIB} MiB", f"{seconds * 1e3:.2f} ms, per rank "
        if dist.get_rank() == 0 and size == sizes[-1]:
            task.add_rate(device, what, "within", rate, found, is_rate=name in OF_FSDP)
        elif dist.get_rank() == 0:
            task.add(what, "info", f"{found}{rate / 1e9:.3g} GB/s")
