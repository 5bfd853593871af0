"""Start one training process per device on this node: `python -m qwen35.launch CONFIG [a.b=c …]`.

The settings are checked before anything starts. The ranks end together: when this process ends,
however it does; when one of them fails, or makes no progress for longer than training.timeout; and
after SIGTERM, SIGHUP or Ctrl-C, on which the run saves and stops, even if nobody reads its output
any more (a second Ctrl-C stops it at once). The first cause of a failure is printed: in one line if
the user can fix it; else with where each rank stood and the traceback of an internal error, and the
ranks are started again, up to training.max_restarts times. With several nodes, the launchers first
find each other (rendezvous.py), and when one node ends, all end. Without --nnodes, a scheduler's
variables say which node this is (cluster.py).

Exit codes: 0 once all steps are done; 143 (130 after Ctrl-C) if the run was asked to stop before.
"""

import argparse
import os
import platform
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn

from qwen35.config.layout import check_layout
from qwen35.config.load import SettingError, load_settings, parse_words
from qwen35.errors import LISTS_FOLDER, USER_ERRORS, Parser, UserError, complain, shortened, visible, whole_number
from qwen35.launch.cluster import find_place
from qwen35.launch.connection import SECRET, check_secret
from qwen35.launch.job import Failure, Job
from qwen35.launch.rendezvous import Rendezvous, RendezvousParameters, join
from qwen35.log import log_at_once, logger, set_up_logging
from qwen35.network import LOOPBACK, interface_of
from qwen35.processes import STOPPED, die_with, stop_code, stop_signals
from qwen35.rank import FAILURE_FILE, RESTART, RESTART_REASON
from qwen35.tools.address import DEFAULT_PORT, check_address, listen

PARENT = "QWEN35_PARENT"  # the job ends with this process, even at kill -9; unset: it outlives its shell
TMP_NAME = "tmp"  # TMPDIR of the ranks, in the folder of one start of the job
MIN_OPEN_FILES = 256
LONGEST_REASON = 500  # characters of a failure that the restarted ranks are told


def main(argv: Sequence[str] | None = None) -> int:
    if PARENT in os.environ:
        die_with(int(os.environ[PARENT]))
    parser = Parser(prog="qwen35.launch", description=__doc__)
    add = parser.add_argument
    add("--nnodes", type=whole_number(1), help="number of nodes; default: a scheduler's, else 1")
    add("--node_rank", type=whole_number(0), default=0, help="number of this node, from 0")
    add("--nproc_per_node", type=whole_number(1), help="processes on this node, one per device; default: 1")
    add("--master_addr", help="address of node 0")
    add("--master_port", type=whole_number(1, 65535), help="of node 0, free; default: any, with several nodes 6000")
    add("--rendezvous_timeout", type=whole_number(1, 86400), default=300, help="seconds to wait for the other nodes")
    add("--preflight", action="store_true", help="compare the nodes, measure an all-reduce, and train nothing")
    add("--logprobs", metavar="FILE", help="write answers' log-probabilities; -: keep the reference's; train nothing")
    args = parse_words(parser, argv)
    if args.node_rank >= (args.nnodes or 1):
        parser.error(f"--node_rank {args.node_rank} is not below --nnodes {args.nnodes or 1}")
    try:
        set_up_logging()
        if not take_place(args):
            return 0
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if open_files < MIN_OPEN_FILES:
            raise SettingError(
                f"ulimit -n is {open_files}: each process of a run needs at least {MIN_OPEN_FILES} open files"
            )
        settings = load_settings(args.config, args.overrides)
        check_layout(settings, args.nnodes * args.nproc_per_node)
        for number in stop_signals():  # before anything waits: the first process of a container ignores SIGTERM else
            signal.signal(number, stop_waiting)
        port = args.master_port if args.node_rank == 0 else None
        check_address(args.master_addr, port, args.nnodes == 1, args.rendezvous_timeout * args.is_scheduled)
        program = "qwen35.preflight" if args.preflight else "qwen35.logprobs" if args.logprobs else "qwen35.train"
        rendezvous = join_rendezvous(args) if args.nnodes > 1 else None
        out = ["--out", args.logprobs] if args.logprobs not in (None, "-") else []
        command, t = [sys.executable, "-m", program, *out, args.config, *args.overrides], settings.training
        return run(command, args, rendezvous, t.timeout, t.max_restarts if program == "qwen35.train" else 0)
    except USER_ERRORS as error:
        return complain(error)


def take_place(args: argparse.Namespace) -> bool:
    """Complete the options that say which node this is. False: another process starts its ranks."""
    place = find_place(os.environ, args.nnodes)
    args.is_scheduled = bool(place and args.nnodes is None)
    if place and args.nnodes is None:
        logger.info(f"{place.source} say: node {place.node_rank} of {place.nnodes}")
        args.nnodes, args.node_rank = place.nnodes, place.node_rank
        args.master_addr, args.master_port = args.master_addr or place.address, args.master_port or place.port
        args.nproc_per_node = args.nproc_per_node or place.processes
        if place.processes not in (None, args.nproc_per_node):
            raise SettingError(
                f"{place.source} come with {place.processes} processes a node, and {args.nproc_per_node} would be started"
                f" here: set NPUS_PER_NODE={place.processes}"
            )
        if not place.is_starter:
            logger.info(f"ASCEND_DEVICE_ID={os.environ['ASCEND_DEVICE_ID']}: the process of device 0 starts all ranks")
            return False
    args.nnodes, args.nproc_per_node = args.nnodes or 1, args.nproc_per_node or 1
    args.master_addr = args.master_addr or "localhost"
    args.master_port = args.master_port or (DEFAULT_PORT if args.nnodes > 1 else None)
    return True


def stop_waiting(number: int, frame: FrameType | None) -> NoReturn:
    log_at_once("stopped before anything was started")
    raise SystemExit(stop_code(number))


def join_rendezvous(args: argparse.Namespace) -> Rendezvous:
    """Raises SettingError, RendezvousError."""
    node_addr = os.environ.get("NODE_ADDR")
    if node_addr and "GLOO_SOCKET_IFNAME" not in os.environ:  # gloo takes an interface; HCCL an address, HCCL_IF_IP
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(node_addr)
    secret = check_secret(os.environ.pop(SECRET, ""))  # removed: the ranks do not need it
    python, torch = ".".join(platform.python_version_tuple()[:2]), version("torch").partition("+")[0]
    must_agree = f"Python {python}, torch {torch}, NPUS_PER_NODE={args.nproc_per_node}"
    params = RendezvousParameters(
        args.node_rank, args.nnodes, args.master_addr, args.master_port, args.rendezvous_timeout, must_agree, secret
    )
    return join(params)


def run(
    command: Sequence[str],
    args: argparse.Namespace,
    rendezvous: Rendezvous | None = None,
    timeout: float | None = None,
    restarts: int = 0,
) -> int:
    """Start `command` for each rank of this node, wait, and report failures. Returns the exit code.

    timeout: seconds that a rank may go without progress. restarts: how often the ranks of all nodes
    are started again after a failure that is not a user error.
    """
    if args.nnodes > 1:
        first, count = args.node_rank * args.nproc_per_node, args.nproc_per_node
        where = "" if args.node_rank == 0 else "; the log is on node 0"
        ranks = f"ranks {first} to {first + count - 1} of {args.nnodes * count}"
        logger.info(f"node {args.node_rank}: {ranks}, rendezvous at {args.master_addr}:{args.master_port}{where}")
    job = Job(command, rendezvous)
    # data loaders make sockets in TMPDIR; if their paths exceed 107 bytes, the workers hang
    temporary = tempfile.gettempdir() if len(tempfile.gettempdir()) < 50 else "/tmp"
    failure = None
    for attempt in range(restarts + 1):
        with tempfile.TemporaryDirectory(prefix="qwen35-", dir=temporary, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            (folder / TMP_NAME).mkdir()
            listener = None
            if args.nnodes == 1:  # bound from now on: the next run on this machine finds another port free
                listener = listen(args.master_port or 0 if attempt == 0 else 0, is_alone=True)
                args.master_port = listener.getsockname()[1]
            environments = rank_environments(args, folder, attempt, failure.message if failure else "")
            failure = job.run(environments, folder, timeout, listener)
        codes = {process.returncode for process in job.processes.values()}
        was_signalled = {-signal.SIGTERM, -signal.SIGHUP} & codes  # a rank died of it before it handled signals
        was_cut_off = bool(failure and job.stop.number and (job.stop.is_forced or was_signalled))
        if failure and failure.ranks_report and not was_cut_off:
            logger.error(failure.ranks_report)
        if not failure or job.stop.number is not None or not failure.can_restart or attempt == restarts:
            break
        print(f"error: {failure.message}", file=sys.stderr, flush=True)
        try:
            if rendezvous:
                args.master_port = rendezvous.regroup(failure.summary, partial(next_port, args))
        except UserError as error:
            failure = Failure(str(error), is_user_error=bool(rendezvous and rendezvous.is_user_error))
            break
        logger.warning(f"restart {attempt + 1} of {restarts}, from the newest checkpoint")
    has_stopped = was_cut_off or bool(not failure and codes & {*STOPPED})
    if rendezvous:
        rendezvous.close(failure.summary if failure else None, bool(failure and failure.is_user_error), has_stopped)
    if was_cut_off and job.stop.is_forced:
        logger.warning("stopped at once; the same command resumes from the newest checkpoint")
    elif was_cut_off:
        logger.warning("stopped outside of the training steps: there was nothing to save")
    elif failure:
        print(f"error: {failure.message}", file=sys.stderr)
    return stop_code(job.stop.number) if has_stopped else int(failure is not None)


def next_port(args: argparse.Namespace) -> int:
    """The port for the ranks of several nodes after a restart; node 0 sends it to the others."""
    try:
        check_address(args.master_addr, args.master_port, is_alone=False)
    except SettingError:  # the old port is not free yet
        with listen(0) as server:
            return server.getsockname()[1]
    return args.master_port


def rank_environments(
    args: argparse.Namespace, folder: Path, attempt: int = 0, failure: str = ""
) -> dict[int, dict[str, str]]:
    """Rank -> the environment of its process, by the names that torch.distributed reads.

    failure: why the attempt before ended.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    count = args.nproc_per_node
    threads = max(1, len(os.sched_getaffinity(0)) // count) if count > 1 else None
    # a single node listens at loopback alone; gloo's default is the address of the host's name
    interface = interface_of(LOOPBACK) if args.nnodes == 1 else None
    reason = visible(shortened(" ".join(failure.split()), LONGEST_REASON))
    environments = {}
    for local_rank in range(count):
        rank = args.node_rank * count + local_rank
        environments[rank] = {
            **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
            **({"GLOO_SOCKET_IFNAME": interface} if interface else {}),
            **inherited,
            **({RESTART: str(attempt), RESTART_REASON: reason} if attempt else {}),
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(args.nnodes * count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": args.master_addr,
            "MASTER_PORT": str(args.master_port),
            "TMPDIR": str(folder / TMP_NAME),  # removed with what killed workers of a data loader leave there
            LISTS_FOLDER: str(folder.parent),
            FAILURE_FILE: str(folder / f"{rank}.json"),
        }
    return environments
