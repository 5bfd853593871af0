"""Where a process stands, told to its launcher: a few bytes of memory that both have, written without waiting for anything.

A rank says what it begins and how long that may take. Its launcher reads that when it is late or gone, and has the rank write
the stacks of its threads behind it, which works while the rank is stuck in C as well. Neither needs a disk, or a thread.
"""

import faulthandler
import mmap
import os
import signal
import struct
import time

HEARTBEAT = "QWEN35_HEARTBEAT"  # descriptor of the memory, inherited
DUMP = signal.SIGUSR1  # has a rank write its stacks
LAYOUT = struct.Struct("dd240s")  # seconds of the machine's clock: when it began, when it is late; what


class Heartbeat:
    """Of this process. Without a launcher nobody reads it."""

    def __init__(self, patience: float = 0.0):
        """patience: seconds that anything may take, unless `at` says more."""
        self.patience = patience
        descriptor = int(os.environ.get(HEARTBEAT, "-1"))
        self._memory = mmap.mmap(descriptor, LAYOUT.size)
        if descriptor >= 0:
            faulthandler.register(DUMP, descriptor, all_threads=True)

    def at(self, what: str, patience: float | None = None) -> None:
        """Say what begins now. About a microsecond."""
        now = time.monotonic()
        late = now + (self.patience if patience is None else patience)
        # in one copy: pack_into would first fill in zeros, and who reads then finds a process that is late since ever
        self._memory[:] = LAYOUT.pack(now, late, what.encode(errors="replace")[:240])
