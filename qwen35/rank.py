"""What every program of a rank does: find its place, read its settings, say why it failed."""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import NoReturn

from qwen35.config.load import load_settings, parse_words
from qwen35.config.schema import Settings
from qwen35.errors import USER_ERRORS, Parser, SettingError, complain, one_line
from qwen35.log import logger, set_up_logging
from qwen35.network import LOOPBACK
from qwen35.processes import stop_code

FAILURE_FILE = "QWEN35_FAILURE_FILE"  # the file in which a failing rank writes the reason
TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"  # the same for torchrun
RESTART = "QWEN35_RESTART"  # how often the ranks have been restarted
RESTART_REASON = "QWEN35_RESTART_REASON"  # the failure before the last of these


def leave(code: int) -> NoReturn:
    """Flush the output and end this process at once.

    A normal exit would wait for workers and peers that may be gone, and abort ("terminate called
    without an active exception") while a thread of a process group still frees a tensor.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the disk is full
        code = code or 1
    os._exit(code)


def number(environment: Mapping[str, str], name: str) -> int:
    """Raises SettingError."""
    if not environment.get(name, "").isdecimal():
        raise SettingError(f"{name}={environment.get(name, '')}: must be a whole number from 0")
    return int(environment[name])


def first_host(environment: Mapping[str, str]) -> str:
    """The first node of a job or a step of Slurm. Raises SettingError."""
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    found = re.match(r"([^\[\],]+)(?:\[(\d+)[^\[\]]*\])?(?:,|$)", names)  # gpu[03-05,9],login
    if not found:
        raise SettingError(f"SLURM_JOB_NODELIST={names}: names no first node that is understood; set MASTER_ADDR")
    return found[1] + (found[2] or "")


def find_place(environment: MutableMapping[str, str]) -> str | None:
    """Set what torch.distributed reads by srun's variables if no launcher has. Returns a log line.

    Raises SettingError where the variables of a rank number something else.
    """
    if "RANK" in environment:
        if environment.get("WORLD_SIZE", "1") != "1" and not environment.get("LOCAL_RANK", "").isdecimal():
            given = " ".join(f"{k}={environment.get(k, '')}" for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
            raise SettingError(
                f"{given}: these number pods, not processes; start `make finetune` or torchrun in each pod"
            )
        return None
    if not {"SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys() or environment.get("SLURM_NTASKS", "1") == "1":
        return None
    rank, local_rank, tasks = (number(environment, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NTASKS"))
    nodes = number({"SLURM_NNODES": "1", **environment}, "SLURM_NNODES")
    if not nodes or tasks % nodes:
        raise SettingError(
            f"SLURM_NTASKS={tasks} on SLURM_NNODES={nodes}: give srun --ntasks-per-node, the same on all"
        )
    job, step = (number({name: "0", **environment}, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(tasks),
        LOCAL_WORLD_SIZE=str(tasks // nodes),
        MASTER_ADDR=environment.get("MASTER_ADDR") or (LOOPBACK if nodes == 1 else first_host(environment)),
        # all tasks must compute the same, and two jobs on a node different ones
        MASTER_PORT=environment.get("MASTER_PORT") or str(20_000 + (31 * job + step) % 10_000),
    )
    where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    return f"rank {rank} of {tasks} by SLURM_PROCID and SLURM_NTASKS, {tasks // nodes} a node, store at {where}"


def record_failure(error: BaseException, is_user_error: bool) -> bool:
    """In a failing process: write the reason for the launcher. False if that is not possible."""
    trace = "" if is_user_error else "".join(traceback.format_exception(error))
    message = one_line(error) if is_user_error else str(error)
    if name := os.environ.get(FAILURE_FILE):
        reason = {"message": message, "traceback": trace, "time": time.time(), "rank": os.environ.get("RANK")}
        reason["is_user_error"] = is_user_error
    elif name := os.environ.get(TORCHRUN_FILE):
        extra = {"py_callstack": trace or message, "timestamp": str(int(time.time()))}
        reason = {"message": {"message": message, "extraInfo": extra}}  # as in torch's ErrorHandler
    else:
        return False
    path = Path(name)
    try:
        path.with_suffix(".new").write_text(json.dumps(reason))
        path.with_suffix(".new").replace(path)
    except OSError:
        return False
    return FAILURE_FILE in os.environ


def run_rank(
    work: Callable[[Settings], int | None],
    name: str,
    description: str | None,
    argv: Sequence[str] | None,
    *user_errors: type[Exception],
) -> int:
    """Call `work` with the settings of the command line. user_errors: further user error types.

    Returns the exit code, which `work` may return. If several ranks fail, the launcher prints the
    reason of the first; no rank prints its own.
    """
    parser = Parser(prog=name, description=description)
    args = parse_words(parser, argv)
    try:
        place = find_place(os.environ)
        set_up_logging(int(os.environ.get("RANK", "0")))
        if place:
            logger.info(place)
        return work(load_settings(args.config, args.overrides)) or 0
    except KeyboardInterrupt:
        return stop_code(signal.SIGINT)
    except BaseException as error:
        is_user_error = isinstance(error, (*USER_ERRORS, *user_errors))
        if record_failure(error, is_user_error):
            leave(1)
        if is_user_error:
            return complain(error)
        raise
