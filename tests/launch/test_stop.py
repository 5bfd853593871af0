"""A stop must save without a reader too: real training behind pipes and terminals that close."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import psutil
import pytest
from forked import Forked, launched
from training_runs import ROOT, WORKER, train_command

from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.training.metrics import read_metrics

ENDLESS = ("training.train_iters=100000", "training.log_interval=1", WORKER)


@pytest.fixture
def temporary(monkeypatch):
    """The folder of temporary files, which must be empty after the run."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)
        assert not list(Path(name).iterdir())


def start(workplace: Path, save: Path, *overrides: str, ranks: int = 2, **kwargs) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(train_command(workplace, save, ranks, *overrides), cwd=ROOT, env=environment, **kwargs)


def fork(workplace: Path, save: Path, *overrides: str, ranks: int = 2, **kwargs) -> Forked:
    """The same without a start of Python, which is not the point of every test."""
    return Forked(launched, train_command(workplace, save, ranks, *overrides), {}, keeps=False)


def wait_for_steps(
    save: Path, count: int, process: subprocess.Popen | Forked, meanwhile=lambda: time.sleep(0.02)
) -> None:
    end = time.monotonic() + 300
    while not (save / "metrics.jsonl").exists() or len(read_metrics(save / "metrics.jsonl")) < count:
        assert time.monotonic() < end and process.poll() is None
        meanwhile()


def assert_saved(save: Path, after: int) -> None:
    step = int(newest_checkpoint(save).name[5:])
    assert step >= after and len(read_metrics(save / "metrics.jsonl")) == step


@pytest.mark.parametrize(
    ("number", "code", "ranks", "how"),
    [(signal.SIGINT, 130, 2, fork), (signal.SIGTERM, 143, 1, start), (signal.SIGHUP, 143, 1, fork)],
)
def test_a_stop_saves_though_the_reader_died_first(workplace, tmp_path, temporary, number, code, ranks, how):
    """`make finetune 2>&1 | tee log` and Ctrl-C: tee is gone before the run logs that it stops."""
    save, log = tmp_path / "run", tmp_path / "log"
    process = how(workplace, save, *ENDLESS, ranks=ranks, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    streams = [stream for stream in (process.stdout, process.stderr) if stream]
    tees = [subprocess.Popen(["tee", "-a", log], stdin=stream, stdout=subprocess.DEVNULL) for stream in streams]
    for stream in streams:
        stream.close()
    wait_for_steps(save, 3, process)
    for tee in tees:
        tee.kill()
        tee.wait()
    process.send_signal(number)
    assert process.wait(timeout=300) == code
    assert_saved(save, after=3)
    assert "weights from" in log.read_text()


def test_a_run_completes_after_its_reader_has_left(workplace, tmp_path, monkeypatch):
    """`make finetune | head -5` exits with 0. Also where the path of TMPDIR is long."""
    save, long = tmp_path / "run", tmp_path / ("t" * 60)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(workplace, save, "training.log_interval=1", WORKER, ranks=1, **both)
    for _ in range(5):
        assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(timeout=300), err) == (0, b"")
    assert len(read_metrics(save / "metrics.jsonl")) == 10
    assert_saved(save, after=10)


def test_a_run_saves_when_its_terminal_is_closed(workplace, tmp_path):
    """It has a progress bar there, gets SIGHUP, and can no longer write."""
    save = tmp_path / "run"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    # as a shell's job: its controlling terminal sends the signal when it closes
    head = "import fcntl, os, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", head, *train_command(workplace, save, 1, *ENDLESS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **ends)
    os.close(theirs)
    shown = []

    def read() -> None:
        if select.select([ours], [], [], 0.02)[0]:
            shown.append(os.read(ours, 1 << 16))

    wait_for_steps(save, 3, process, read)
    read()
    assert re.search(rb"(step/s|s/step)\b", b"".join(shown))
    os.close(ours)
    assert process.wait(timeout=300) == 143
    assert_saved(save, after=3)


def test_a_run_saves_though_all_its_processes_get_the_signal(workplace, tmp_path, temporary):
    """SIGHUP to ranks and workers too, with both streams closed. None listens beyond loopback."""
    save = tmp_path / "run"
    process = fork(workplace, save, *ENDLESS)
    wait_for_steps(save, 3, process)
    process.stdout.close()
    process.stderr.close()
    processes = psutil.Process(process.pid).children(recursive=True)
    assert len(processes) >= 4
    sockets = [
        socket.laddr.ip for each in [*processes, process] for socket in psutil.Process(each.pid).net_connections()
    ]
    assert sockets and {ip.removeprefix("::ffff:") for ip in sockets} == {"127.0.0.1"}
    for each in [*processes, process]:
        each.send_signal(signal.SIGHUP)
    assert process.wait(timeout=300) == 143
    assert_saved(save, after=3)
    assert not psutil.wait_procs(processes, timeout=300)[1]


def test_nohup_ignores_sighup(workplace, tmp_path):
    save = tmp_path / "run"
    process = start(
        workplace, save, *ENDLESS, ranks=1, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    wait_for_steps(save, 2, process)
    process.send_signal(signal.SIGHUP)
    steps = len(read_metrics(save / "metrics.jsonl"))
    wait_for_steps(save, steps + 3, process)
    process.terminate()
    assert b"stopping: " in process.stderr.read()
    assert process.wait(timeout=300) == 143
    assert_saved(save, after=steps + 3)


PRINTS = """
import logging, os, sys, warnings
from tqdm import tqdm
from qwen35.console import outlive_readers
outlive_readers()
logging.basicConfig()
bar = tqdm(total=3000, mininterval=0)
for i in range(3000):
    print("é", i, flush=i % 2 == 0)
    print(i, file=sys.stderr)
    logging.getLogger("of a library").error("i %d", i)
    warnings.warn(f"{i}")
    bar.update()
    bar.write("x", file=sys.stderr)
    if i == 5:
        sys.stdin.read()  # until the readers have left
os.write(3, b"done")
"""


def test_bars_logs_and_warnings_outlive_their_reader():
    """The process exits with 0, though Python flushes what is left at its end."""
    reader, writer = os.pipe()
    head = f"import os; os.dup2({writer}, 3)\n" if writer != 3 else ""
    process = subprocess.Popen(
        [sys.executable, "-c", head + PRINTS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, pass_fds=[writer],
    )  # fmt: skip
    os.close(writer)
    assert process.stdout.readline() == "é 0\n".encode()
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(timeout=300) == 0
    assert os.read(reader, 10) == b"done"
    os.close(reader)


# `python -m PROGRAM --help` of each, in a fork that need not import torch, and ends as Python does
WITHOUT_READER = """
import os, runpy, sys
import torch.distributed.checkpoint
for program in sys.argv[1:]:
    reader, writer = os.pipe()
    os.close(reader)
    if not os.fork():
        os.dup2(writer, 1)
        sys.argv = [program, "--help"]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        sys.exit("did not end")
    print(program, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_every_program_of_a_run_outlives_its_reader():
    names = "launch launch.hosts train preflight convert tools.tiny inference.evaluate".split()
    programs = [f"qwen35.{name}" for name in names]
    command = [sys.executable, "-c", WITHOUT_READER, *programs, "json.tool"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=buffered)
    *ours, foreign = done.stdout.splitlines()
    assert ours == [f"{program} 0" for program in programs]
    assert foreign == "json.tool 120"  # as ours would without outlive_readers
    head, error = done.stderr.splitlines()  # of that one alone: ours are silent
    assert head.startswith("Exception ignored") and error.startswith("BrokenPipeError")


def test_outlive_readers_changes_nothing_for_a_reader():
    """Text, encoding and buffering are the same; other write errors are still raised."""
    program = "import sys; from qwen35.console import outlive_readers; outlive_readers(); {}"
    first = "print('é'); print('err', file=sys.stderr); sys.stdout.write('no line end')"
    done = subprocess.run([sys.executable, "-c", program.format(first)], cwd=ROOT, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == ("é\nno line end".encode(), b"err\n")
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-c", program.format("print('x', flush=True)")]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert b"No space left on device" in done.stderr and done.returncode != 0
    closed = subprocess.run(
        ["bash", "-c", f'exec "{sys.executable}" -c "$0" >&- 2>&-', program.format("print(1)")], cwd=ROOT, check=False
    )
    assert closed.returncode == 0
