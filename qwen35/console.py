"""Standard output and error that outlive whoever reads them: a run must not fail for want of a reader, it has to save."""

import contextlib
import errno
import io
import os
import sys

GONE = (errno.EPIPE, errno.EIO)  # the other end of a pipe was closed; the terminal was


class _Output(io.TextIOWrapper):
    """Where nobody reads it any more, what is written goes nowhere."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._go_nowhere(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._go_nowhere(error)

    def _go_nowhere(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), self.fileno())


def outlive_readers() -> None:
    """Where a program begins. It then holds for whatever prints here: progress bars and other packages' logs as well."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # it was not closed when the program began
            raw = io.BufferedWriter(io.FileIO(stream.fileno(), "wb", closefd=False))
            output = _Output(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
            setattr(sys, name, output)


def say_at_once(line: str) -> None:
    """On standard error from the handler of a signal, which may have come while something was printed."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
