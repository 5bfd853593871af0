"""Processes that end with their parent, and runs that stop when a signal asks them to."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

PR_SET_PDEATHSIG = 1  # of Linux's prctl
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a run that stopped before its last step


def die_with(parent: int) -> None:
    """In a new process: have Linux kill it when `parent`, which started it, ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def obey(parent: int) -> None:
    """In a new process: let a SIGTERM end it only if `parent` sent it. Linux, main thread only."""
    if sys.platform != "linux":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    Thread(target=wait, daemon=True).start()


def stop_signals() -> list[int]:
    """Those that ask a run to save and stop: SIGTERM, SIGINT, and SIGHUP unless under nohup."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


def stop_code(number: int | None) -> int:
    """The exit code after a stop signal, or after one that another process got (None)."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


class StopRequest:
    """The signal that has asked this process to stop. A second Ctrl-C interrupts it at once."""

    number: int | None = None

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Handle stop_signals() until the block ends. Main thread only."""
    request = StopRequest()
    before = {number: signal.signal(number, request.ask) for number in stop_signals()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
