"""Standard output and error that outlive whoever reads them: a run must not fail for want of a reader, it has to save."""

import contextlib
import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO)  # the other end of a pipe was closed; the terminal was


class _Output(io.FileIO):
    """Where nobody reads it any more, what is written goes nowhere."""

    def write(self, content: Any) -> int | None:  # type: ignore[override]  # any bytes
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in GONE:
                raise
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), self.fileno())
        return super().write(content)


def outlive_readers() -> None:
    """Where a program begins. It then holds for whatever prints here: progress bars and other packages' logs as well."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # it was not closed when the program began
            raw = _Output(stream.fileno(), "wb", closefd=False)
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering
            )
            setattr(sys, name, wrapped)


def say_at_once(line: str) -> None:
    """On standard error from the handler of a signal, which may have come while something was printed."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
