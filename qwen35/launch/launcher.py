"""Start one training process a device on this machine: `python -m qwen35.launch [options] CONFIG [a.b=c …]`.

The settings are checked before anything starts. The processes end together: with this one, however it ends; when one of
them fails, or stands still for longer than training.timeout; and after SIGTERM, SIGHUP or Ctrl-C, which have the run save and
stop, whether anybody still reads what is printed or not (a second Ctrl-C stops it at once). What is printed of a failure is
what came first: one line where it is the user's to mend; else where every process stood, and the traceback where it is ours.
Up to training.max_restarts times they are then started again.
Of several machines the launchers meet first and compare what must agree (rendezvous.py), and what ends one of them ends all.
"""

import argparse
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from qwen35.config.layout import check_layout
from qwen35.config.load import SettingError, load_settings
from qwen35.config.schema import Settings
from qwen35.console import say_at_once
from qwen35.errors import USER_ERRORS, Parser, UserError, complain, whole_number
from qwen35.launch.consistency import facts
from qwen35.launch.handshake import SECRET, check_secret
from qwen35.launch.job import Failure, Job
from qwen35.launch.nodes import Meeting, Place
from qwen35.launch.rendezvous import Talk, free_port, listen, meet
from qwen35.network import LOOPBACK, interface_of
from qwen35.processes import die_with, stop_signals
from qwen35.rank import FAILURE_FILE, RESTART

PARENT = "QWEN35_PARENT"  # process with which the job ends, kill -9 included; unset: a job outlives the shell that started it
TEMPORARY = "tmp"
OPEN_FILES = 256


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
    add("--rendezvous_timeout", type=whole_number(1, 86400), default=300, help="seconds to wait for the other machines")
    add("--preflight", action="store_true", help="compare the machines, measure an all-reduce, and train nothing")
    add("config", help="a recipe, e.g. configs/tiny.yaml")
    add("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    args = parser.parse_args(argv)
    if args.node_rank >= args.nnodes:
        parser.error(f"--node_rank {args.node_rank} is not below --nnodes {args.nnodes}")
    try:
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if open_files < OPEN_FILES:
            raise SettingError(f"ulimit -n is {open_files}: a process of a run needs {OPEN_FILES} open files and more")
        settings = load_settings(args.config, args.overrides)
        check_layout(settings, args.nnodes * args.nproc_per_node)
        check_address(args)
        program = "qwen35.preflight" if args.preflight else "qwen35.train"
        meeting = meet_others(args, settings) if args.nnodes > 1 else None
        command, t = [sys.executable, "-m", program, args.config, *args.overrides], settings.training
        return run(command, args, meeting, t.timeout, 0 if args.preflight else t.max_restarts)
    except USER_ERRORS as error:
        return complain(error)


def stop_waiting(number: int, frame: FrameType | None) -> NoReturn:
    say_at_once("stopped before anything was started")
    raise SystemExit(128 + signal.SIGINT if number == signal.SIGINT else 0)


def meet_others(args: argparse.Namespace, settings: Settings) -> Meeting:
    """Raises SettingError, MeetingError."""
    for number in stop_signals():
        signal.signal(number, stop_waiting)
    own = os.environ.get("NODE_ADDR")
    if own and "GLOO_SOCKET_IFNAME" not in os.environ:  # gloo takes an interface, HCCL an address: HCCL_IF_IP
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(own)
    secret = check_secret(os.environ.pop(SECRET, ""))  # the ranks have no need of it
    place = Place(args.node_rank, args.nnodes, args.master_addr, args.master_port, args.rendezvous_timeout, secret)
    return meet(place, Talk(partial(facts, settings, args.nproc_per_node), Path(settings.training.save)))


def run(
    command: Sequence[str],
    args: argparse.Namespace,
    meeting: Meeting | None = None,
    patience: float | None = None,
    restarts: int = 0,
) -> int:
    """Start `command` for each rank of this machine, wait, tell what went wrong. Returns the exit code.

    patience: seconds that a rank may stand still. restarts: how often the ranks of all machines are started again after a
    failure that is not the user's to mend.
    """
    if args.nnodes > 1:
        first, own = args.node_rank * args.nproc_per_node, args.nproc_per_node
        where = "" if args.node_rank == 0 else "; the log is on machine 0"
        told = f"ranks {first} to {first + own - 1} of {args.nnodes * own}, which meet at {args.master_addr}:{args.master_port}"
        print(f"machine {args.node_rank}: {told}{where}", flush=True)
    job, port = Job(command, meeting), args.master_port
    # below it loaders have sockets, whose paths may have 107 bytes: beyond that their workers would hang
    temporary = tempfile.gettempdir() if len(tempfile.gettempdir()) < 50 else "/tmp"
    for attempt in range(restarts + 1):
        with tempfile.TemporaryDirectory(prefix="qwen35-", dir=temporary, ignore_cleanup_errors=True) as name:
            Path(name, TEMPORARY).mkdir()
            more = {RESTART: str(attempt), "MASTER_PORT": str(port)} if attempt else {}
            environments = {rank: one | more for rank, one in rank_environments(args, Path(name)).items()}
            failure = job.run(environments, Path(name), patience)
        codes = {process.returncode for process in job.processes.values()}
        is_ended = {-signal.SIGTERM, -signal.SIGHUP} & codes  # by a signal, before it listened for any
        is_stopped = job.asked is not None and bool(not failure or job.at_once or is_ended)
        if failure and failure.where and not is_stopped:
            print(failure.where, file=sys.stderr)
        if not failure or is_stopped or job.asked is not None or not failure.may_go_on or attempt == restarts:
            break
        print(f"error: {failure.words}", file=sys.stderr, flush=True)
        try:
            port = next_port(args)
            port = meeting.regroup(failure.line, port) if meeting else port
        except UserError as error:
            failure = Failure(str(error), is_mistake=bool(meeting and meeting.is_mistake))
            break
        print(f"restart {attempt + 1} of {restarts}, from the newest checkpoint", file=sys.stderr, flush=True)
    if meeting:
        meeting.close(failure.line if failure else None, bool(failure and failure.is_mistake))
    if is_stopped:
        if job.at_once:
            print("stopped at once; the same command goes on from the newest checkpoint", file=sys.stderr)
        elif failure:
            print("stopped outside of the training steps: there was nothing to save", file=sys.stderr)
        return 128 + signal.SIGINT if job.asked == signal.SIGINT else 0
    if failure:
        print(f"error: {failure.words}", file=sys.stderr)
    return 1 if failure else 0


def next_port(args: argparse.Namespace) -> int:
    """Where the ranks of the next start can meet; machine 0 tells it to the others."""
    try:
        check_address(args)
    except SettingError:  # it is not free yet
        return free_port(is_alone=args.nnodes == 1)
    return args.master_port


def check_address(args: argparse.Namespace) -> None:
    """MASTER_ADDR must mean something, and where rank 0 will be the port must be free. Raises SettingError."""
    host, port = args.master_addr, args.master_port
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise SettingError(f"MASTER_ADDR={host}: no machine of that name is known here") from None
    if args.node_rank > 0:
        return
    try:
        listen(port, is_alone=args.nnodes == 1).close()
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
    # alone, no process listens where other machines are: gloo would at the address of this machine's name
    interface = interface_of(LOOPBACK) if args.nnodes == 1 else None
    environments = {}
    for local_rank in range(own):
        rank = args.node_rank * own + local_rank
        environments[rank] = {
            **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
            **({"GLOO_SOCKET_IFNAME": interface} if interface else {}),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(args.nnodes * own),
            "LOCAL_WORLD_SIZE": str(own),
            "MASTER_ADDR": args.master_addr,
            "MASTER_PORT": str(args.master_port),
            "TMPDIR": str(folder / TEMPORARY),  # of what workers of the loader leave when they are ended
            FAILURE_FILE: str(folder / f"{rank}.json"),
        }
    return environments
