"""Commands, ranks and trainings forked from a server that has imported what they need.

Imports take most of the time of a short training, and its plots most of the rest. The forks differ
from real ones only in that they do not exec, that all ranks have the same hash seed, and that
loss.png is empty and a page has its plots' titles alone unless the environment has PLOTS.
"""

import atexit
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, NoReturn

import pytest
import torch.multiprocessing

ROOT = Path(__file__).parents[1]
PYTHON = str(Path(sys.executable).absolute())  # tests change the folder
PATHS = f"{ROOT}:{ROOT}/tests/starts"  # PYTHONPATH of what is started in other folders
MAINS = {
    "train": "qwen35.train",
    "launch": "qwen35.launch.launcher",
    "config": "qwen35.config.load",
    "data": "qwen35.data.__main__",
    "convert": "qwen35.checkpoint.convert",
    "evaluate": "qwen35.inference.evaluate",
    "generate": "qwen35.inference.generate",
    "predict": "qwen35.inference.predict",
}
PLOTS = "PLOTS"
TORCHRUN = "torch.distributed.run"
PACKAGES = {"qwen35.launch": MAINS["launch"], "accept": "accept.__main__"}  # whose main is in another module
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_executable(PYTHON)
OF_TESTS = ("forked", "mistakes", "saver_run", "faults", "collectives")
# frozen comes last: each fork would look through all that the others leave for garbage, and copy it
CONTEXT.set_forkserver_preload([*OF_TESTS, *MAINS.values(), "matplotlib.pyplot", "torch._dynamo", "frozen"])


def process_of(work: Callable, *arguments: object) -> multiprocessing.Process:
    ensure_server()
    process = CONTEXT.Process(target=work, args=arguments)
    process.start()
    return process


def ensure_server() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{PATHS}:{ROOT}/tests")  # of the server, and of what forks start
        forkserver.ensure_running()


def spawn(work: Callable, *arguments: object, ranks: int) -> None:
    """Run `work(rank, *arguments)` in each rank's process."""
    ensure_server()
    torch.multiprocessing.start_processes(work, arguments, ranks, start_method="forkserver")


def start(work: Callable, *arguments: object) -> tuple[multiprocessing.Process, list[int]]:
    """Run `work(outputs, *arguments)`, which calls `take(outputs)`. Returns process and pipes."""
    pipes = [os.pipe(), os.pipe()]
    ours, theirs = zip(*pipes, strict=True)
    handles = [Connection(descriptor, readable=False) for descriptor in theirs]
    process = process_of(work, handles, *arguments)
    for handle in handles:
        handle.close()
    return process, list(ours)


def take(outputs: list[Connection]) -> None:
    """Make them stdout and stderr of this process."""
    for number, handle in enumerate(outputs, 1):
        os.dup2(handle.fileno(), number)
        handle.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))


class Forked:
    """A forked process with the interface of subprocess.Popen.

    What it writes is kept, unless the caller reads from `stdout` and `stderr`.
    """

    def __init__(self, work: Callable, command: list[str], environment: dict[str, str], keeps: bool = True):
        self.args = command
        self._process, outputs = start(work, command, os.environ | {"OMP_NUM_THREADS": "1"} | environment)
        atexit.register(self._process.kill)  # before multiprocessing waits for it
        self.pid, self._texts = self._process.pid, ["", ""]
        self.stdout, self.stderr = streams = [os.fdopen(descriptor, "rb") for descriptor in outputs]
        self._readers = [
            threading.Thread(target=self._read, args=numbered, daemon=True)
            for numbered in (enumerate(streams) if keeps else ())
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int, stream: BinaryIO) -> None:
        with io.TextIOWrapper(stream) as pipe:
            for line in pipe:
                self._texts[number] += line

    @property
    def out(self) -> str:
        """What it has written so far."""
        return self._texts[0]

    @property
    def err(self) -> str:
        return self._texts[1]

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until no process is left that could print."""
        for each in (*self._readers, self._process):
            each.join(timeout)
        if self.poll() is None or any(reader.is_alive() for reader in self._readers):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._texts[0], self._texts[1]


def run_code(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -c code arguments`, whose imports have been done."""
    process = Forked(ran, [code, *arguments], environment)
    out, err = process.communicate(300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ran(outputs: list[Connection], command: list[str], environment: dict[str, str]) -> None:
    """A program's text, with its arguments."""
    _run(outputs, environment, lambda: _execute(command[0], ["-c", *command[1:]]))


def launched(outputs: list[Connection], command: list[str], environment: dict[str, str]) -> None:
    """A launcher, by the words of its command line."""
    _run(outputs, environment, lambda: _main(command))


def _run(outputs: list[Connection], environment: dict[str, str], main: Callable[[], int]) -> None:
    os.chdir(ROOT)
    _reset(environment)
    take(outputs)
    fork_ranks()
    _leave(main)


def fork_ranks() -> None:
    """A launcher in this process forks its ranks."""
    from qwen35.launch import job

    job.subprocess = AS_SUBPROCESS


def _leave(main: Callable[[], int]) -> NoReturn:
    from qwen35.rank import leave

    try:
        leave(main())
    except BaseException:
        traceback.print_exc()
        leave(1)


def _main(command: list[str]) -> int:
    """What `python -m MODULE …`, `python tests/FILE.py …` or `python -c TEXT …` would do."""
    from qwen35.console import outlive_readers

    outlive_readers()
    sys.orig_argv = list(command)
    how, *words = command[1:]
    while how in ("-u", "-W"):  # and what is ignored
        how, *words = words if how == "-u" else words[1:]
    if how == "-c":
        return _execute(words[0], ["-c", *words[1:]])
    if how == "-m":
        return _main_of(PACKAGES.get(words[0], words[0]))(words[1:]) or 0
    if Path(how).parent != ROOT / "tests":
        return _execute(Path(how).read_text(), [how, *words])
    return import_module(Path(how).stem).main(words)


def _main_of(name: str) -> Callable[[list[str]], int | None]:
    """A module's main; what it starts is forked, too."""
    if name == TORCHRUN:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.Popen, subprocess_handler.subprocess = Child, AS_SUBPROCESS  # this one on torch 2.7
    elif name == PACKAGES["accept"]:
        from accept import __main__, runs

        __main__.subprocess = runs.subprocess = AS_SUBPROCESS
    return import_module(name).main


def _execute(text: str, arguments: list[str]) -> int:
    sys.argv = arguments
    try:
        exec(compile(text, arguments[0], "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    return 0


def _reset(environment: dict[str, str]) -> None:
    from qwen35.training import report

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    if PLOTS not in environment:
        report.as_svg = lambda plots: [title for title, _ in plots]
        report.draw_loss = lambda run, folder: (folder / "loss.png").touch()
    for folder in environment.get("PYTHONPATH", "").split(":"):
        if (site := Path(folder, "sitecustomize.py")).is_file():  # as python does when it starts
            exec(compile(site.read_text(), site, "exec"), {})


class Child:
    """A process as launchers start it by subprocess.Popen, but forked from the launcher."""

    def __init__(
        self,
        args,
        env,
        stdin=None,
        stdout=None,
        stderr=None,
        start_new_session=False,
        preexec_fn=lambda: None,
        pass_fds=(),  # a fork has them all
        text=True,
        errors="replace",
    ):
        self.args, self.returncode = args, None
        self.stderr = stderr = tempfile.TemporaryFile() if stderr == subprocess.PIPE else stderr  # noqa: SIM115
        self.pid = os.fork()
        if self.pid:
            return

        def run() -> int:
            preexec_fn()
            if start_new_session:
                os.setsid()
            for number, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), number)
            _reset(env)
            return _main(args)

        _leave(run)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = float("inf")) -> tuple[None, str]:
        self.wait(timeout)
        self.stderr.seek(0)
        return None, self.stderr.read().decode(errors="replace")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# in place of the module subprocess; all write where the first one does, whose reader waits for them
AS_SUBPROCESS = SimpleNamespace(
    Popen=Child, PIPE=subprocess.PIPE, DEVNULL=None, TimeoutExpired=subprocess.TimeoutExpired
)
