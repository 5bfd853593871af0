"""A launcher and a training with injected faults.

`faults.py launch NNODES NODE_RANK NPROC PORT RESTARTS RECIPE [a.b=c …]`. FAULTS has items
RESTART:RANK:STEP:FAULT, separated by spaces: after so many restarts, the forward pass of this step
on this rank (* for all) has the fault: hang, kill, kill-launcher, nan or error. With SAVE_SECONDS
each rank takes so long before it writes its part of a checkpoint.
"""

import argparse
import ctypes
import os
import signal
import sys
import time

from qwen35 import train
from qwen35.checkpoint import async_save
from qwen35.launch import launcher
from qwen35.model import Qwen35
from qwen35.rank import RESTART, leave


def hang_in_c() -> None:
    while True:
        ctypes.PyDLL(None).sleep(600)  # in C with the GIL held: no other Python thread runs


def rank_main(arguments: list[str]) -> int:
    faults = {}
    for item in os.environ["FAULTS"].split():
        restart, rank, step, fault = item.split(":")
        if restart == os.environ.get(RESTART, "0") and rank in (os.environ["RANK"], "*"):
            faults[int(step)] = fault
    real_step, real_loss = train.train_step, Qwen35.loss
    current: str | None = None

    def train_step(run, *others):
        nonlocal current
        current = faults.get(run.step + 1)
        if current == "hang":
            run.heartbeat.timeout = 2.0  # from here on; earlier parts of the run keep half an hour
        return real_step(run, *others)

    def loss(self, *others):
        if current == "hang":
            hang_in_c()
        elif current == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif current == "kill-launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            hang_in_c()
        elif current == "error":
            raise RuntimeError("an internal error")
        first, *rest = real_loss(self, *others)
        return first * float("nan") if current == "nan" else first, *rest

    real_write, seconds = async_save.write_shards, float(os.environ.get("SAVE_SECONDS", "0"))

    def write_shards(*others):
        time.sleep(seconds)
        return real_write(*others)

    train.train_step, Qwen35.loss, async_save.write_shards = train_step, loss, write_shards
    return train.main(arguments)


def launch_main(nnodes: str, node_rank: str, processes: str, port: str, restarts: str, *arguments: str) -> int:
    args = argparse.Namespace(
        nnodes=int(nnodes),
        node_rank=int(node_rank),
        nproc_per_node=int(processes),
        master_addr="localhost",
        master_port=int(port),
        rendezvous_timeout=200,
    )
    rendezvous = launcher.join_rendezvous(args) if args.nnodes > 1 else None
    command = [sys.executable, __file__, "rank", *arguments]
    return launcher.run(command, args, rendezvous, timeout=600.0, restarts=int(restarts))


def main(arguments: list[str]) -> int:
    return launch_main(*arguments[1:]) if arguments[0] == "launch" else rank_main(arguments[1:])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
