"""Start one training process a device on this machine: `python -m qwen35.launch [options] CONFIG [a.b=c …]`.

The settings are checked before anything starts. The processes end together: with this one, however it ends; when one of
them fails; and after SIGTERM or Ctrl-C, which have the run save and stop (a second Ctrl-C stops it at once). What is printed
of a failure is what came first: one line where it is the user's to mend, the traceback where it is ours. Of several machines
the launchers meet first and compare what must agree (meeting.py), and what ends one of them ends all.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from qwen35.agreement import facts
from qwen35.config import SettingError, load_settings
from qwen35.errors import USER_ERRORS, Parser, complain, one_line, whole_number
from qwen35.layout import check_layout
from qwen35.meeting import Meeting, Place, Talk, listen, meet
from qwen35.processes import die_with
from qwen35.settings import Settings

FAILURE_FILE = "QWEN35_FAILURE_FILE"  # where a process that fails leaves its reason
PARENT = "QWEN35_PARENT"  # process with which the job ends, kill -9 included; unset: a job outlives the shell that started it
GRACE = 3.0  # seconds that the others have to fail for a reason of their own before they are ended
AGAIN = 1.0  # a Ctrl-C so many seconds after the first is a second one, and not the same through another process


class Job:
    """The processes of this machine, by rank."""

    def __init__(
        self, command: Sequence[str], environments: dict[int, dict[str, str]], failures: Path, meeting: Meeting | None
    ):
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.failures = failures
        self.meeting = meeting
        self.first_failed: int | None = None
        self.asked: int | None = None  # the signal that asked for the end
        self.asked_at = 0.0
        self.at_once = False  # it was asked twice
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)
        for rank, environment in environments.items():
            self.processes[rank] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C reaches them through this process alone
                preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # there is one thread here
            )

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self.asked_at = number, time.monotonic()
            print("stopping: the run saves at the next log step (Ctrl-C again: at once)", file=sys.stderr, flush=True)
            self.send(signal.SIGTERM)
        elif number == signal.SIGINT and time.monotonic() - self.asked_at > AGAIN:
            self.at_once = True
            self.send(signal.SIGKILL)

    def send(self, number: int) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> dict[int, int]:
        """Until all have ended; when one has failed, the others do not outlive it for long. Returns their exit codes."""
        failed_at: float | None = None
        while None in (codes := {rank: process.poll() for rank, process in self.processes.items()}).values():
            if self.meeting:
                self.meeting.record_news(self.failures)
            if failed_at is None:
                failed = {rank: code for rank, code in codes.items() if code}
                if failed:  # what a signal ended comes first: the others may have failed for want of it
                    self.first_failed = min(failed, key=lambda rank: failed[rank])
                if failed or any(self.failures.iterdir()):  # with its reason told, a process may still hang as it ends
                    failed_at = time.monotonic()
            elif time.monotonic() - failed_at > GRACE:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        return {rank: process.returncode for rank, process in self.processes.items()}


def main(argv: Sequence[str] | None = None) -> int:
    if PARENT in os.environ:
        die_with(int(os.environ[PARENT]))
    parser = Parser(prog="qwen35.launch", description=__doc__)
    add = parser.add_argument
    add("--nnodes", type=whole_number(1), default=1, help="machines that take part")
    add("--node_rank", type=whole_number(0), default=0, help="which of them this one is")
    add("--nproc_per_node", type=whole_number(1), default=1, help="processes here, one a device")
    add("--master_addr", default="localhost", help="address of machine 0")
    add("--master_port", type=whole_number(1, 65535), default=6000, help="free port of machine 0")
    add("--rendezvous_timeout", type=whole_number(1), default=300, help="seconds to wait for the other machines")
    add("--preflight", action="store_true", help="compare the machines, measure an all-reduce, and train nothing")
    add("config", help="a recipe, e.g. configs/tiny.yaml")
    add("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    args = parser.parse_args(argv)
    if args.node_rank >= args.nnodes:
        parser.error(f"--node_rank {args.node_rank} is not below --nnodes {args.nnodes}")
    try:
        settings = load_settings(args.config, args.overrides)
        check_layout(settings, args.nnodes * args.nproc_per_node)
        check_address(args.master_addr, args.master_port, is_own=args.node_rank == 0)
        program = "qwen35.preflight" if args.preflight else "qwen35.train"
        meeting = meet_others(args, settings) if args.nnodes > 1 else None
        return run([sys.executable, "-m", program, args.config, *args.overrides], args, meeting)
    except USER_ERRORS as error:
        return complain(error)
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr)
        return 128 + signal.SIGINT


def meet_others(args: argparse.Namespace, settings: Settings) -> Meeting:
    place = Place(args.node_rank, args.nnodes, args.master_addr, args.master_port, args.rendezvous_timeout)
    return meet(place, Talk(partial(facts, settings, args.nproc_per_node), Path(settings.training.save)))


def run(command: Sequence[str], args: argparse.Namespace, meeting: Meeting | None = None) -> int:
    """Start `command` for each rank of this machine, wait, tell what went wrong. Returns the exit code."""
    if args.nnodes > 1:
        first, own = args.node_rank * args.nproc_per_node, args.nproc_per_node
        where = "" if args.node_rank == 0 else "; the log is on machine 0"
        told = f"ranks {first} to {first + own - 1} of {args.nnodes * own}, which meet at {args.master_addr}:{args.master_port}"
        print(f"machine {args.node_rank}: {told}{where}", flush=True)
    with tempfile.TemporaryDirectory(prefix="qwen35-") as name:
        job = Job(command, rank_environments(args, Path(name)), Path(name), meeting)
        codes = job.wait()
        words = failure(codes, job.first_failed, Path(name))
    if meeting:
        meeting.close(words.splitlines()[-1] if words else None)
    if job.asked is not None and (not words or job.at_once or -signal.SIGTERM in codes.values()):
        if job.at_once:
            print("stopped at once; the same command goes on from the newest checkpoint", file=sys.stderr)
        elif words:
            print("stopped outside of the training steps: there was nothing to save", file=sys.stderr)
        return 128 + signal.SIGINT if job.asked == signal.SIGINT else 0
    if words:
        print(f"error: {words}", file=sys.stderr)
    return 1 if words else 0


def check_address(host: str, port: int, is_own: bool) -> None:
    """MASTER_ADDR must mean something, and where rank 0 will be the port must be free. Raises SettingError."""
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise SettingError(f"MASTER_ADDR={host}: no machine of that name is known here") from None
    if not is_own:
        return
    try:
        listen(port).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise SettingError(
            f"MASTER_PORT={port} cannot be used on this machine ({why}): another program has it, perhaps an earlier run; set"
            f" another, e.g. MASTER_PORT={port % 65535 + 1}"
        ) from None


def rank_environments(args: argparse.Namespace, folder: Path) -> dict[int, dict[str, str]]:
    """Rank -> the environment of its process, by the names that torch.distributed reads."""
    own = args.nproc_per_node
    threads = max(1, len(os.sched_getaffinity(0)) // own) if own > 1 else None
    environments = {}
    for local_rank in range(own):
        rank = args.node_rank * own + local_rank
        environments[rank] = {
            **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(args.nnodes * own),
            "LOCAL_WORLD_SIZE": str(own),
            "MASTER_ADDR": args.master_addr,
            "MASTER_PORT": str(args.master_port),
            FAILURE_FILE: str(folder / f"{rank}.json"),
        }
    return environments


def failure(codes: dict[int, int], first_failed: int | None, folder: Path) -> str | None:
    """What to tell of a job whose processes ended so; None if all is well."""
    told: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    told.sort(key=lambda reason: reason["time"])
    # a rank whose peer is gone may fail in the same moment; the user's own mistake explains it
    expected = next((reason["message"] for reason in told if reason["expected"]), None)
    if expected:
        return expected
    if told and not (first_failed is not None and codes[first_failed] < 0):
        return f"{told[0]['traceback']}rank {told[0]['rank']}: {told[0]['message']}"
    if first_failed is None:  # all in the same moment
        first_failed = next((rank for rank, code in codes.items() if code), None)
    return None if first_failed is None else f"rank {first_failed} {ending(codes[first_failed])}"


def ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}{'; out of memory?' if name == 'SIGKILL' else ''}"


def leave(code: int) -> NoReturn:
    """End this process here and now, with nothing left to write.

    Python's own way out would wait for workers and peers that may be gone, and abort ("terminate called without an
    active exception") where a thread of a process group still lets go of a tensor.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads them any more, or their disk is full
        code = code or 1
    os._exit(code)


def record_failure(error: BaseException, expected: bool) -> bool:
    """In a process that fails: leave the reason for the launcher. False if there is none, or no room on the disk."""
    if FAILURE_FILE not in os.environ:
        return False
    reason = {
        "message": one_line(error) if expected else str(error),
        "traceback": "" if expected else "".join(traceback.format_exception(error)),
        "time": time.time(),
        "rank": os.environ.get("RANK"),
        "expected": expected,
    }
    path = Path(os.environ[FAILURE_FILE])
    try:
        path.with_suffix(".new").write_text(json.dumps(reason))
        path.with_suffix(".new").replace(path)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
