"""Processes that end with the one that started them, and runs that stop where they are asked to."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def die_with(parent: int) -> None:
    """In a new process: have Linux end it when the process `parent`, which started it, ends, kill -9 included."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)


def obey(parent: int) -> None:
    """In a new process: have a SIGTERM end it that the process `parent` has sent, and no other. Main thread only, on Linux."""
    if sys.platform != "linux":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    Thread(target=wait, daemon=True).start()


def stop_signals() -> list[int]:
    """Those that ask a run to save and stop: SIGTERM, Ctrl-C, a terminal that is closed unless nohup has it ignored."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


class StopRequest:
    """Whether a signal has asked this process to stop. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for stop_signals() until the block ends. Main thread only."""
    request = StopRequest()
    before = {number: signal.signal(number, request.ask) for number in stop_signals()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
