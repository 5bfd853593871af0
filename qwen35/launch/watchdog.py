"""What a launcher sees of its ranks: which has stalled, and where each stood at a failure."""

import contextlib
import mmap
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from qwen35.heartbeat import DUMP_SIGNAL, LAYOUT

STACK_TIMEOUT = 3.0  # seconds that ranks have to write their stacks
SETTLE_TIME = 0.2  # seconds without another byte after which a stack is complete

Processes = Mapping[int, subprocess.Popen[bytes]]


class Watch:
    """Memory shared with one rank: its heartbeat, then the stacks that it writes on request."""

    def __init__(self, timeout: float | None):
        """timeout: seconds until the rank's first heartbeat is due; None: no limit."""
        self.descriptor = os.memfd_create("qwen35")
        os.ftruncate(self.descriptor, LAYOUT.size)
        os.lseek(self.descriptor, 0, os.SEEK_END)  # the offset is shared: stacks of all writers are appended
        self._memory = mmap.mmap(self.descriptor, LAYOUT.size)
        self._timeout, self._started = timeout, time.monotonic()

    def read(self) -> tuple[float, float | None, str]:
        """Start and deadline (by time.monotonic()) of its activity, and its name; "": none yet."""
        start, deadline, activity = LAYOUT.unpack_from(self._memory)
        if not (start and deadline):  # one of them is zero while the first heartbeat is written
            return self._started, None if self._timeout is None else self._started + self._timeout, ""
        return start, deadline, activity.rstrip(b"\0").decode(errors="ignore")

    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def stacks(self) -> str:
        return os.pread(self.descriptor, self.size(), LAYOUT.size).decode(errors="replace")

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)


class Watchdog:
    """Watches the ranks of this node."""

    def __init__(self, ranks: Iterable[int], timeout: float | None):
        self.watches = {rank: Watch(timeout) for rank in ranks}

    def close(self) -> None:
        for watch in self.watches.values():
            watch.close()

    def find_stalled(self, processes: Processes) -> str | None:
        """The message about the live rank that stalled first; None: all is well."""
        now = time.monotonic()
        live = [(*watch.read(), rank) for rank, watch in self.watches.items() if processes[rank].poll() is None]
        stalled = [
            (start, activity, rank)
            for start, deadline, activity, rank in live
            if deadline is not None and deadline < now
        ]
        if not stalled:
            return None
        start, activity, rank = min(stalled)
        return (
            f"rank {rank} has stood still for {now - start:.0f} s (training.timeout): {activity or 'before it began'}"
        )

    def collect_stacks(self, processes: Processes) -> None:
        """Have every live rank write its stacks, and its loader's workers if it waits for data."""
        ranks = {r: p for r, p in processes.items() if p.poll() is None and self.watches[r].read()[2]}
        for process in ranks.values():
            process.send_signal(DUMP_SIGNAL)
        self._settle(ranks)
        for rank, process in ranks.items():
            watch = self.watches[rank]
            for worker in children(process.pid) if "data" in watch.read()[2] else ():
                os.write(watch.descriptor, f"\nworker {worker} of the loader\n".encode())
                with contextlib.suppress(ProcessLookupError):  # it has ended by now
                    os.kill(worker, DUMP_SIGNAL)
                self._settle([rank])

    def _settle(self, ranks: Iterable[int]) -> None:
        """Wait, at most STACK_TIMEOUT, until all of these ranks have written and no more comes."""
        watches = [self.watches[rank] for rank in ranks]
        sizes, since, deadline = [watch.size() for watch in watches], time.monotonic(), time.monotonic() + STACK_TIMEOUT
        while time.monotonic() < deadline:
            time.sleep(0.02)
            now = [watch.size() for watch in watches]
            if now != sizes:
                sizes, since = now, time.monotonic()
            elif all(size > LAYOUT.size for size in sizes) and time.monotonic() - since > SETTLE_TIME:
                return

    def report(self, processes: Processes, endings: Mapping[int, str]) -> str:
        """Where each rank stood, how it ended, stacks, CANN's logs; "" if none had begun."""
        if not any(watch.read()[2] for watch in self.watches.values()):
            return ""
        now, lines = time.monotonic(), ["where the ranks of this node stood:"]
        ranks_of: dict[str, list[str]] = {}
        for rank, watch in self.watches.items():
            start, _, activity = watch.read()
            where = f"{activity}, for {now - start:.0f} s" if activity else "before it began"
            details = "; ".join(filter(None, [where, endings.get(rank)]))
            lines.append(f"  rank {rank} (process {processes[rank].pid}): {details}")
            if stacks := readable(watch.stacks()):
                ranks_of.setdefault(stacks, []).append(str(rank))
        for stacks, ranks in ranks_of.items():
            lines.append(f"stacks of rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}:")
            lines.extend(f"  {line}" for line in stacks.splitlines())
        return "\n".join([*lines, *plogs(process.pid for process in processes.values())])


def readable(stacks: str) -> str:
    """Stacks without idle threads, and without thread ids, so that equal ones compare equal."""
    relevant = [
        part for part in stacks.split("\n\n") if "Current thread" in part or "/qwen35/" in part or "worker " in part
    ]
    text = re.sub(r"hread 0x[0-9a-f]+", "hread", "\n".join(relevant)).strip()  # Thread, thread
    return re.sub(rf'File "(?:{re.escape(str(Path.cwd()))}/|[^"]*/site-packages/)', 'File "', text)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def plogs(pids: Iterable[int]) -> list[str]:
    """Lines that name CANN's logs of these processes; none where there is no CANN.

    They are in ASCEND_PROCESS_LOG_PATH, else log/ below ASCEND_WORK_PATH, else ~/ascend/log, in
    files named by process. Source: CANN's references of environment variables and of logs.
    """
    given, work = os.environ.get("ASCEND_PROCESS_LOG_PATH"), os.environ.get("ASCEND_WORK_PATH")
    folder = Path(given) if given else Path(work, "log") if work else Path.home() / "ascend" / "log"
    if not folder.is_dir():
        return [f"CANN's log: {folder}, which does not exist"] if given or "ASCEND_HOME_PATH" in os.environ else []
    files = [str(file) for pid in pids for file in sorted(folder.glob(f"**/plog-{pid}_*.log"))]
    return [f"CANN's log: {file}" for file in files] or [f"CANN's log: {folder}, which has nothing of these processes"]
