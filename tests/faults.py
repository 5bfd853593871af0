"""Training that goes wrong where it is told to, and the launcher of it.

`faults.py launch NNODES NODE_RANK NPROC PORT RESTARTS RECIPE [a.b=c …]`. FAULTS, words of the form RESTART:RANK:STEP:WHAT, says
what happens in the forward pass of a step of a rank, after so many restarts: hang, kill, kill-launcher, nan, error.
"""

import argparse
import ctypes
import os
import signal
import sys

from qwen35 import train
from qwen35.config.load import load_settings
from qwen35.launch import launcher
from qwen35.model import Qwen35
from qwen35.rank import RESTART, leave


def stand_still() -> None:
    while True:
        ctypes.PyDLL(None).sleep(600)  # in C, and no other thread of Python may run


def rank_main(arguments: list[str]) -> int:
    faults = {}
    for word in os.environ["FAULTS"].split():
        restart, rank, step, what = word.split(":")
        if restart == os.environ.get(RESTART, "0") and rank in (os.environ["RANK"], "*"):
            faults[int(step)] = what
    real_step, real_loss, now = train.train_step, Qwen35.loss, []

    def train_step(run, *others):
        now[:] = [faults.get(run.step + 1)]
        if now == ["hang"]:
            run.heartbeat.patience = 2.0  # instead of half an hour; all else of this run may take that
        return real_step(run, *others)

    def loss(self, *others):
        if now == ["hang"]:
            stand_still()
        elif now == ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        elif now == ["kill-launcher"]:
            os.kill(os.getppid(), signal.SIGKILL)
            stand_still()
        elif now == ["error"]:
            raise RuntimeError("of ours")
        first, *rest = real_loss(self, *others)
        return first * float("nan") if now == ["nan"] else first, *rest

    train.train_step, Qwen35.loss = train_step, loss
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
    meeting = launcher.meet_others(args, load_settings(arguments[0], arguments[1:])) if args.nnodes > 1 else None
    command = [sys.executable, __file__, "rank", *arguments]
    return launcher.run(command, args, meeting, patience=600.0, restarts=int(restarts))


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        sys.exit(launch_main(*sys.argv[2:]))
    leave(rank_main(sys.argv[2:]))
