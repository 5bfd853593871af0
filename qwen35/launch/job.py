"""The ranks of this node: they end together, and what failed first is reported."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from qwen35.heartbeat import HEARTBEAT
from qwen35.launch.rendezvous import Rendezvous
from qwen35.launch.watchdog import Watchdog
from qwen35.log import log_at_once
from qwen35.network import STORE_LISTENER
from qwen35.processes import STOPPED, die_with, stop_signals

FAILURE_GRACE = 3.0  # seconds that the other ranks have to report failures of their own before they are killed
DUPLICATE_SIGNAL = 1.0  # seconds within which a second Ctrl-C is taken for the first, delivered twice


@dataclass(frozen=True)
class Failure:
    message: str
    is_user_error: bool = False  # for the user to fix: a restart would meet it again
    can_restart: bool = False
    ranks_report: str = ""  # where each rank stood

    @property
    def summary(self) -> str:
        """For the other nodes: one line, without a traceback."""
        line = re.search(r"^rank \d+: .*", self.message, re.MULTILINE)
        return line[0] if line else self.message.splitlines()[-1]


class Stop:
    """The first signal that asked the run to stop. A second Ctrl-C stops it at once."""

    def __init__(self, stop: Callable[[], None], kill: Callable[[], None], where: str = ""):
        self.stop, self.kill, self.where = stop, kill, where
        self.number: int | None = None
        self.time = 0.0
        self.is_forced = False  # the user asked twice
        for number in stop_signals():
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:  # nothing is called until it is set: a second signal would be handled meanwhile
            self.number, self.time = number, now
            self.stop()  # before anything that may fail
            log_at_once(f"stopping: the run saves at the next log step{self.where} (Ctrl-C again: at once)")
        elif number == signal.SIGINT and now - self.time > DUPLICATE_SIGNAL:
            self.is_forced = True
            self.kill()


class Job:
    """The processes of this node by rank; a restart replaces them."""

    def __init__(self, command: Sequence[str], rendezvous: Rendezvous | None = None):
        self.command, self.rendezvous = command, rendezvous
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.sent: set[tuple[int, int]] = set()  # rank and signal: once, though one may come while the ranks start
        self.stop = Stop(partial(self.send_signal, signal.SIGTERM), partial(self.send_signal, signal.SIGKILL))

    def run(
        self,
        environments: dict[int, dict[str, str]],
        failures: Path,
        timeout: float | None,
        listener: socket.socket | None = None,
    ) -> Failure | None:
        """Start all ranks and wait for them.

        failures: an empty folder for their failures; listener: the socket of the store of rank 0.
        """
        watchdog = Watchdog(environments, timeout)
        self.processes, self.sent = {}, set()
        for rank, environment in environments.items():
            inherited = {HEARTBEAT: watchdog.watches[rank].descriptor}
            if listener and rank == 0:
                inherited[STORE_LISTENER] = listener.fileno()
            self.processes[rank] = subprocess.Popen(
                self.command,
                env=environment | {name: str(descriptor) for name, descriptor in inherited.items()},
                pass_fds=list(inherited.values()),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal reaches the ranks through this process alone
                preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # this process has one thread
            )
        if listener:
            listener.close()
        if self.stop.number is not None:  # the signal came before there were processes
            self.send_signal(signal.SIGTERM)
        failure = self.wait(watchdog, failures)
        watchdog.close()
        return failure

    def send_signal(self, number: int) -> None:
        for rank, process in self.processes.items():
            if process.poll() is None and (rank, number) not in self.sent:
                self.sent.add((rank, number))
                process.send_signal(number)

    def wait(self, watchdog: Watchdog, failures: Path) -> Failure | None:
        """Wait until all ranks have ended; kill them when one has failed or stalled."""
        failed: dict[int, int] = {}  # rank -> exit code, in the order seen, before this process killed the others
        failed_at: float | None = None
        stalled: str | None = None
        codes_before_kill: dict[int, int | None] | None = None
        while True:
            codes = {rank: process.poll() for rank, process in self.processes.items()}
            if codes_before_kill is None:
                ends = {rank: code for rank, code in codes.items() if code and code not in STOPPED}
                failed |= {rank: code for rank, code in ends.items() if rank not in failed}
            if None not in codes.values():
                break
            if self.rendezvous:
                self.rendezvous.record_failure(failures)
            if failed_at is None:
                if failed or read_reasons(failures):  # a rank that has given its reason may still hang as it ends
                    failed_at = time.monotonic()
                elif stalled := watchdog.find_stalled(self.processes):
                    failed_at = time.monotonic() - FAILURE_GRACE
            elif time.monotonic() - failed_at > FAILURE_GRACE and codes_before_kill is None:
                codes_before_kill = codes
                if not (self.stop.is_forced or any(reason["is_user_error"] for reason in read_reasons(failures))):
                    watchdog.collect_stacks(self.processes)
                self.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        reasons = read_reasons(failures)
        message = stalled or failure_message(failed, reasons)
        if not message:
            return None
        if not stalled and any(reason["is_user_error"] for reason in reasons):
            return Failure(message, is_user_error=True)
        errors = {int(r["rank"]): r["message"].strip().partition("\n")[0] for r in reasons if r["rank"] is not None}
        endings = {
            rank: errors.get(rank) or (ending(code) if code else "")
            for rank, code in (codes_before_kill or codes).items()
        }
        can_restart = all(reason["can_restart"] for reason in reasons if reason["rank"] is None)
        return Failure(message, can_restart=can_restart, ranks_report=watchdog.report(self.processes, endings))


def read_reasons(folder: Path) -> list[dict[str, Any]]:
    """The reasons that ranks have left for their failures (rank.record_failure), oldest first."""
    reasons: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(reasons, key=lambda reason: reason["time"])


def failure_message(codes: Mapping[int, int], reasons: Sequence[Mapping[str, Any]]) -> str | None:
    """The message about a job that ended with these exit codes and reasons; None if all is well."""
    # a rank whose peer is gone may fail at the same moment; a user error is the cause of both
    user_error = next((reason["message"] for reason in reasons if reason["is_user_error"]), None)
    if user_error:
        return user_error
    here = [f"{r['traceback']}rank {r['rank']}: {r['message']}" for r in reasons if r["rank"] is not None]
    elsewhere = [reason["message"] for reason in reasons if reason["rank"] is None]
    # Peers, on other nodes too, may report their loss before a rank's death is seen here. An abort
    # may itself follow from the loss of a peer, unless it came first.
    first = next(iter(codes.items()), None)
    killed = [
        (rank, code)
        for rank, code in codes.items()
        if code < 0 and (code != -signal.SIGABRT or ((rank, code) == first and not elsewhere))
    ]
    if here + elsewhere and not killed:
        return "\nerror: ".join(here[:1] + elsewhere)  # which of the two caused the other is unknown
    rank_and_code = next(iter(killed), first)
    return None if rank_and_code is None else f"rank {rank_and_code[0]} {ending(rank_and_code[1])}"


def ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was ended by {name}{'; out of memory?' if name == 'SIGKILL' else ''}"
