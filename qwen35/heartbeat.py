"""What a process is doing, for its launcher: a few bytes of shared memory, written without waiting.

A rank writes what it begins and how long that may take. When it stalls or dies, its launcher reads
this, and has the rank append the stacks of its threads, which works even while the rank is stuck in
C code. Neither needs a disk or a thread.
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
    """The heartbeat of this process. Without a launcher nobody reads it."""

    def __init__(self, timeout: float = 0.0):
        """timeout: seconds that an activity may take unless `at` is given another."""
        self.timeout = timeout
        descriptor = int(os.environ.get(HEARTBEAT, "-1"))
        self._memory = mmap.mmap(descriptor, LAYOUT.size)
        if descriptor >= 0:
            faulthandler.register(DUMP_SIGNAL, descriptor, all_threads=True)

    def at(self, activity: str, timeout: float | None = None) -> None:
        """Record what begins now. About a microsecond, unless LOG_LEVEL=DEBUG logs it."""
        logger.debug(activity)
        now = time.monotonic()
        deadline = now + (self.timeout if timeout is None else timeout)
        # one copy: pack_into writes zeros first, which a reader would take for a stalled rank
        self._memory[:] = LAYOUT.pack(now, deadline, activity.encode(errors="replace")[:240])
