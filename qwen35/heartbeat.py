"""What a process is doing, for its launcher: a few bytes of shared memory, written without waiting.

A rank writes what it begins and how long that may take. When it stalls or dies, its launcher reads
this, and has the rank append the stacks of its threads, which works even while the rank is stuck in
C code. Neither needs a disk or a thread.

Without our launcher nobody reads it. Then a rank that exceeds its time prints its stacks and ends
itself, so that whoever started it (torchrun, srun) learns of it.
"""

import faulthandler
import mmap
import os
import signal
import struct
import time

from qwen35.log import logger

HEARTBEAT = "QWEN35_HEARTBEAT"  # inherited descriptor of the shared memory
DUMP_SIGNAL = signal.SIGUSR1  # makes a rank write its stacks
LAYOUT = struct.Struct("dd240s")  # start and deadline (time.monotonic() seconds), activity


class Heartbeat:
    """The heartbeat of this process."""

    def __init__(self, timeout: float = 0.0):
        """timeout: seconds that an activity may take unless `at` is given another; 0: any time."""
        self.timeout = timeout
        descriptor = int(os.environ.get(HEARTBEAT, "-1"))
        self._is_read = descriptor >= 0
        self._memory = mmap.mmap(descriptor, LAYOUT.size)
        if self._is_read:
            faulthandler.register(DUMP_SIGNAL, descriptor, all_threads=True)

    def at(self, activity: str, timeout: float | None = None) -> None:
        """Record what begins now. A microsecond, or 14 without a launcher, unless it is logged."""
        logger.debug(activity)
        now = time.monotonic()
        seconds = self.timeout if timeout is None else timeout
        if seconds and not self._is_read:
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        # one copy: pack_into writes zeros first, which a reader would take for a stalled rank
        self._memory[:] = LAYOUT.pack(now, now + seconds, activity.encode(errors="replace")[:240])

    def close(self) -> None:
        """Nothing has a time limit any more."""
        faulthandler.cancel_dump_traceback_later()
