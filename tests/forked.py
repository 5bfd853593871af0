"""Runs whose launcher and ranks are forked from this process, which has imported all that they need: two thirds of a short
run's time is imports. What they do is what qwen35.launch and qwen35.train do; only exec is left out.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib import pyplot as plt  # noqa: F401  # what a run imports late
from training_runs import train_command

from qwen35 import job, launch, train
from qwen35.console import outlive_readers
from qwen35.processes import die_with

torch.optim.SGD([torch.zeros(1)])  # torch._dynamo too


class Forked:
    """A process that does `work`, as subprocess.Popen has one that does a command."""

    def __init__(self, work: Callable[[], int], out: Path | None = None):
        self.out, self.returncode = out, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        try:
            launch.leave(work())
        except BaseException as error:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            launch.leave(error.code if isinstance(error, SystemExit) else 1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked run", timeout)
            time.sleep(0.01)
        return self.out.read_text(), self.out.with_suffix(".err").read_text()


def _rank(command, env, pass_fds, stdin, start_new_session, preexec_fn) -> Forked:
    def work() -> int:
        preexec_fn()
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        tempfile.tempdir = None
        outlive_readers()
        return train.main(command[3:])

    return Forked(work)


def start_forked(workplace: Path, save: Path, ranks: int, *overrides: str) -> Forked:
    """As start_training."""
    parent, out = os.getpid(), save.with_suffix(".out")

    def work() -> int:
        die_with(parent)
        for path, descriptor in ((out, 1), (out.with_suffix(".err"), 2)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        job.subprocess = SimpleNamespace(Popen=_rank, DEVNULL=None)
        outlive_readers()
        return launch.main(train_command(workplace, save, ranks, *overrides)[3:])

    return Forked(work, out)
