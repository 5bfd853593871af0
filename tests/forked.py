"""Commands and trainings forked from a server that has imported what they need.

Imports take most of the time of a short training. The forks differ from real ones only in that they
do not exec, and that all ranks have the same hash seed.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = str(Path(sys.executable).absolute())  # tests change the folder
MAINS = {
    "train": "qwen35.train",
    "launch": "qwen35.launch.launcher",
    "config": "qwen35.config.load",
    "data": "qwen35.data.__main__",
    "convert": "qwen35.checkpoint.convert",
    "evaluate": "qwen35.inference.evaluate",
    "generate": "qwen35.inference.generate",
}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_executable(PYTHON)
CONTEXT.set_forkserver_preload(["forked", "mistakes", *MAINS.values(), "matplotlib.pyplot", "torch._dynamo"])


def start(work: Callable, *arguments: object) -> tuple[multiprocessing.Process, list[int]]:
    """Run `work(outputs, *arguments)`, which calls `take(outputs)`. Returns process and pipes."""
    pipes = [os.pipe(), os.pipe()]
    ours, theirs = zip(*pipes, strict=True)
    handles = [Connection(descriptor, readable=False) for descriptor in theirs]
    process = CONTEXT.Process(target=work, args=(handles, *arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")  # for the fork server and for what the commands start
        process.start()
    for handle in handles:
        handle.close()
    return process, list(ours)


def take(outputs: list[Connection]) -> None:
    """Make them stdout and stderr of this process."""
    for number, handle in enumerate(outputs, 1):
        os.dup2(handle.fileno(), number)
        handle.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))


class ForkedTraining:
    """The launcher of a training and its ranks, with the interface of subprocess.Popen."""

    def __init__(self, command: list[str]):
        self.args = command
        self._process, outputs = start(_launch, command[3:], os.environ | {"OMP_NUM_THREADS": "1"})
        atexit.register(self._process.kill)  # before multiprocessing waits for it
        self.pid, self._texts = self._process.pid, ["", ""]
        self._readers = [
            threading.Thread(target=self._read, args=numbered, daemon=True) for numbered in enumerate(outputs)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int, descriptor: int) -> None:
        with open(descriptor) as pipe:
            self._texts[number] = pipe.read()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until no process is left that could print."""
        for each in (*self._readers, self._process):
            each.join(timeout)
        if self.poll() is None or any(reader.is_alive() for reader in self._readers):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._texts[0], self._texts[1]


def _launch(outputs: list[Connection], arguments: list[str], environment: dict[str, str]) -> None:
    from qwen35.console import outlive_readers
    from qwen35.launch import job, launcher
    from qwen35.rank import leave

    _reset(environment)
    take(outputs)
    outlive_readers()
    job.subprocess = SimpleNamespace(Popen=_Rank, DEVNULL=None)
    try:
        leave(launcher.main(arguments))
    except BaseException:
        traceback.print_exc()
        leave(1)


def _reset(environment: dict[str, str]) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    tempfile.tempdir = None


class _Rank:
    """A rank as qwen35.launch.job starts it, but forked from the launcher."""

    def __init__(self, command, env, pass_fds, stdin, start_new_session, preexec_fn):
        from qwen35 import train
        from qwen35.console import outlive_readers
        from qwen35.rank import leave

        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            preexec_fn()
            os.setsid()
            _reset(env)
            outlive_readers()
            leave(train.main(command[3:]))
        except BaseException:
            traceback.print_exc()
            leave(1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)
