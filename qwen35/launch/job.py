"""The processes of one machine: how they end, together, and what is told of it."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from qwen35.console import say_at_once
from qwen35.heartbeat import HEARTBEAT
from qwen35.launch.nodes import Meeting
from qwen35.launch.watchdog import Watchdog
from qwen35.processes import die_with, stop_signals

GRACE = 3.0  # seconds that the others have to fail for a reason of their own before they are ended
AGAIN = 1.0  # a Ctrl-C so many seconds after the first is a second one, and not the same through another process


@dataclass(frozen=True)
class Failure:
    words: str
    is_mistake: bool = False  # the user's to mend: another start would meet it again
    may_go_on: bool = False  # another start may help
    where: str = ""  # each process stood

    @property
    def line(self) -> str:
        """For the other machines: without the traceback, and of a message of several lines the first."""
        found = re.search(r"^rank \d+: .*", self.words, re.MULTILINE)
        return found[0] if found else self.words.splitlines()[-1]


class Job:
    """The processes of this machine, by rank; those that follow them too."""

    def __init__(self, command: Sequence[str], meeting: Meeting | None = None):
        self.command, self.meeting = command, meeting
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.asked: int | None = None  # the signal that asked for the end
        self.asked_at = 0.0
        self.at_once = False  # it was asked twice
        for number in stop_signals():
            signal.signal(number, self.ask)

    def run(self, environments: dict[int, dict[str, str]], failures: Path, patience: float | None) -> Failure | None:
        """Start a process for each rank and wait until all have ended. failures: an empty folder."""
        watchdog = Watchdog(environments, patience)
        self.processes = {}
        for rank, environment in environments.items():
            descriptor = watchdog.watches[rank].descriptor
            self.processes[rank] = subprocess.Popen(
                self.command,
                env=environment | {HEARTBEAT: str(descriptor)},
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C reaches them through this process alone
                preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # there is one thread here
            )
        if self.asked is not None:  # before there was anyone to tell
            self.send(signal.SIGTERM)
        failure = self.wait(watchdog, failures)
        watchdog.close()
        return failure

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self.asked_at = number, time.monotonic()
            self.send(signal.SIGTERM)  # before anything that may fail
            say_at_once("stopping: the run saves at the next log step (Ctrl-C again: at once)")
        elif number == signal.SIGINT and time.monotonic() - self.asked_at > AGAIN:
            self.at_once = True
            self.send(signal.SIGKILL)

    def send(self, number: int) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, watchdog: Watchdog, failures: Path) -> Failure | None:
        """Until all have ended; when one has failed or stands still, the others do not outlive it for long."""
        failed: dict[int, int] = {}  # rank -> how it ended, as seen, before this process ended the others
        failed_at: float | None = None
        late: str | None = None
        ended: dict[int, int | None] | None = None  # before this process ended the others
        while True:
            codes = {rank: process.poll() for rank, process in self.processes.items()}
            if ended is None:
                failed |= {rank: code for rank, code in codes.items() if code and rank not in failed}
            if None not in codes.values():
                break
            if self.meeting:
                self.meeting.record_news(failures)
            if failed_at is None:
                if failed or reasons(failures):  # with its reason told, a process may still hang as it ends
                    failed_at = time.monotonic()
                elif late := watchdog.look(self.processes):
                    failed_at = time.monotonic() - GRACE
            elif time.monotonic() - failed_at > GRACE and ended is None:
                ended = codes
                if not (self.at_once or any(map(is_mistake, reasons(failures)))):
                    watchdog.gather(self.processes)
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        words = late or failure(failed, failures)
        told = reasons(failures)
        if not words:
            return None
        if not late and any(map(is_mistake, told)):
            return Failure(words, is_mistake=True)
        errors = {int(r["rank"]): r["message"].strip().partition("\n")[0] for r in told if r["rank"] is not None}
        endings = {rank: errors.get(rank) or (ending(c) if c else "") for rank, c in (ended or codes).items()}
        may_go_on = all(reason["again"] for reason in told if reason["rank"] is None)
        return Failure(words, may_go_on=may_go_on, where=watchdog.report(self.processes, endings))


def reasons(folder: Path) -> list[dict[str, Any]]:
    """What the processes have told of their failures, the first one first."""
    told: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(told, key=lambda reason: reason["time"])


def is_mistake(reason: dict[str, Any]) -> bool:
    """Of a user: here, or on the machine that told of it."""
    return reason["expected"] if reason["rank"] is not None else reason["mistake"]


def failure(codes: Mapping[int, int | None], folder: Path) -> str | None:
    """What to tell of a job whose processes ended so, the first one first; None if all is well."""
    told = reasons(folder)
    # a rank whose peer is gone may fail in the same moment; the user's own mistake explains it
    mistake = next((reason["message"] for reason in told if is_mistake(reason)), None)
    if mistake:
        return mistake
    here = [f"{r['traceback']}rank {r['rank']}: {r['message']}" for r in told if r["rank"] is not None]
    elsewhere = [reason["message"] for reason in told if reason["rank"] is None]
    failed = [(rank, code) for rank, code in codes.items() if code]
    # peers may tell of their loss before a rank's end is seen, on other machines too; an abort may itself be the answer to
    # a loss, unless it came first
    killed = [
        end for end in failed if end[1] < 0 and (end[1] != -signal.SIGABRT or (end == failed[0] and not elsewhere))
    ]
    if here + elsewhere and not killed:
        return "\nerror: ".join(here[:1] + elsewhere)  # which of the two is the answer to the other cannot be told
    first = next(iter(killed or failed), None)
    return None if first is None else f"rank {first[0]} {ending(first[1])}"


def ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was ended by {name}{'; out of memory?' if name == 'SIGKILL' else ''}"
