"""What a launcher sees of its ranks: whether one is late, and where all of them stand when the job is over."""

import contextlib
import mmap
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from qwen35.heartbeat import DUMP, LAYOUT

ANSWER = 3.0  # seconds that the ranks have to write their stacks
QUIET = 0.2  # seconds after which no more is coming

Processes = Mapping[int, subprocess.Popen[bytes]]


class Watch:
    """The memory that a launcher shares with one rank: its heartbeat, and behind it the stacks that it was asked for."""

    def __init__(self, patience: float | None):
        """patience: seconds until the rank must have said something; None: for ever."""
        self.descriptor = os.memfd_create("qwen35")
        os.ftruncate(self.descriptor, LAYOUT.size)
        os.lseek(self.descriptor, 0, os.SEEK_END)  # where all who have it write next
        self._memory = mmap.mmap(self.descriptor, LAYOUT.size)
        self._patience, self._started = patience, time.monotonic()

    def read(self) -> tuple[float, float | None, str]:
        """Seconds of time.monotonic() at which it began and from which it is late, and what; "" if it has said nothing."""
        begun, late, what = LAYOUT.unpack_from(self._memory)
        if not (begun and late):  # the second: its first words are just being written
            return self._started, None if self._patience is None else self._started + self._patience, ""
        return begun, late, what.rstrip(b"\0").decode(errors="ignore")

    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def stacks(self) -> str:
        return os.pread(self.descriptor, self.size(), LAYOUT.size).decode(errors="replace")

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)


class Watchdog:
    """Of the ranks of this machine."""

    def __init__(self, ranks: Iterable[int], patience: float | None):
        self.watches = {rank: Watch(patience) for rank in ranks}

    def close(self) -> None:
        for watch in self.watches.values():
            watch.close()

    def look(self, processes: Processes) -> str | None:
        """What to say of the ranks if any that lives is late: of the first that is. None: all is well."""
        now = time.monotonic()
        seen = [(*watch.read(), rank) for rank, watch in self.watches.items() if processes[rank].poll() is None]
        if not (
            standing := [(begun, what, rank) for begun, late, what, rank in seen if late is not None and late < now]
        ):
            return None
        begun, what, rank = min(standing)
        return f"rank {rank} has stood still for {now - begun:.0f} s (training.timeout): {what or 'before it began'}"

    def gather(self, processes: Processes) -> None:
        """Have every rank that lives write its stacks, and its loader's workers if it waits for those."""
        asked = {r: p for r, p in processes.items() if p.poll() is None and self.watches[r].read()[2]}
        for process in asked.values():
            process.send_signal(DUMP)
        self._settle(asked)
        for rank, process in asked.items():
            watch = self.watches[rank]
            for worker in children(process.pid) if "data" in watch.read()[2] else ():
                os.write(watch.descriptor, f"\nworker {worker} of the loader\n".encode())
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(worker, DUMP)
                self._settle([rank])

    def _settle(self, ranks: Iterable[int]) -> None:
        """Until these have written, and nothing more comes."""
        watches = [self.watches[rank] for rank in ranks]
        sizes, since, end = [watch.size() for watch in watches], time.monotonic(), time.monotonic() + ANSWER
        while time.monotonic() < end:
            time.sleep(0.02)
            now = [watch.size() for watch in watches]
            if now != sizes:
                sizes, since = now, time.monotonic()
            elif all(size > LAYOUT.size for size in sizes) and time.monotonic() - since > QUIET:
                return

    def report(self, processes: Processes, endings: Mapping[int, str]) -> str:
        """Where each rank stood and how it ended, the stacks, each once, and CANN's logs; "" if none has said anything."""
        now, lines = time.monotonic(), []
        ranks_of: dict[str, list[str]] = {}
        for rank, watch in self.watches.items():
            begun, _, what = watch.read()
            told = [
                f"{what}, for {now - begun:.0f} s" if what else "before it began",
                *filter(None, [endings.get(rank)]),
            ]
            lines.append(f"  rank {rank} (process {processes[rank].pid}): {'; '.join(told)}")
            if stacks := readable(watch.stacks()):
                ranks_of.setdefault(stacks, []).append(str(rank))
        if not any(watch.read()[2] for watch in self.watches.values()):
            return ""
        for stacks, ranks in ranks_of.items():
            lines.append(f"stacks of rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}:")
            lines.extend(f"  {line}" for line in stacks.splitlines())
        return "\n".join(["where the ranks of this machine stood:", *lines, *plogs(p.pid for p in processes.values())])


def readable(stacks: str) -> str:
    """Without what differs between ranks that stand at the same place, and without threads that only wait for work."""
    kept = [
        part for part in stacks.split("\n\n") if "Current thread" in part or "/qwen35/" in part or "worker " in part
    ]
    text = re.sub(r"hread 0x[0-9a-f]+", "hread", "\n".join(kept)).strip()
    return re.sub(rf'File "(?:{re.escape(str(Path.cwd()))}/|[^"]*/site-packages/)', 'File "', text)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def plogs(pids: Iterable[int]) -> list[str]:
    """Where CANN's own words on these processes are; nothing where there is no CANN.

    ASCEND_PROCESS_LOG_PATH, else log/ below ASCEND_WORK_PATH, else ~/ascend/log, in files named by process, says CANN's
    reference of environment variables and its log reference.
    """
    given, work = os.environ.get("ASCEND_PROCESS_LOG_PATH"), os.environ.get("ASCEND_WORK_PATH")
    folder = Path(given) if given else Path(work, "log") if work else Path.home() / "ascend" / "log"
    if not folder.is_dir():
        return [f"CANN's log: {folder}, which is not there"] if given or "ASCEND_HOME_PATH" in os.environ else []
    found = [str(file) for pid in pids for file in sorted(folder.glob(f"**/plog-{pid}_*.log"))]
    return [f"CANN's log: {file}" for file in found] or [f"CANN's log: {folder}, which has nothing of these processes"]
