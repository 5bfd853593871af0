"""Output streams that survive their reader: a run whose terminal has closed must still save."""

import errno
import io
import os
import sys

READER_GONE = (errno.EPIPE, errno.EIO)  # a closed pipe, a closed terminal


class _Output(io.TextIOWrapper):
    """Discards what is written once nobody can read it."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._discard(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        if error.errno not in READER_GONE:
            raise error
        with open(os.devnull, "wb") as null:  # noqa: PTH123
            os.dup2(null.fileno(), self.fileno())


def outlive_readers() -> None:
    """Call first in a program. Covers all output, also of progress bars and other packages."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # None: it was closed before the program began
            raw = io.BufferedWriter(io.FileIO(stream.fileno(), "wb", closefd=False))
            output = _Output(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
            setattr(sys, name, output)
