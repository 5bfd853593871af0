"""The logger of a run: to the console, and on rank 0 also to <save>/train.log.

Every line has the time. INFO lines come from rank 0 alone and say no more, so that they stay easy
to read and to parse; lines of other levels, which any rank may write, name the rank and the level.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from qwen35.errors import SettingError, visible

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

logger = logging.getLogger("qwen35")


class _Formatter(logging.Formatter):
    def __init__(self, rank: int | None):
        super().__init__()
        self.rank = "" if rank is None else f"rank {rank} "

    def format(self, record: logging.LogRecord) -> str:
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        tag = "" if record.levelno == logging.INFO else f"{self.rank}{record.levelname}: "
        text = visible(f"{tag}{record.getMessage()}", keep="\n\t")  # it may name records and files
        return "\n".join(f"{now} {line}" for line in text.split("\n"))


class _Console(logging.Handler):
    """To sys.stdout or sys.stderr, above a progress bar. Raises OSError, as a print would."""

    def __init__(self, stream: str):
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        stream = getattr(sys, self.stream)
        if stream is not None and not getattr(record, "file_only", False):
            tqdm.write(self.format(record), stream)
            stream.flush()


class _File(logging.Handler):
    """Appends to a file once it has a path: a run that fails before its first step leaves none."""

    path: Path | None = None
    pending = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.pending += f"{self.format(record)}\n"
        if self.path:
            self.begin(self.path)

    def begin(self, path: Path) -> None:
        self.path, text, self.pending = path, self.pending, ""
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            logger.removeHandler(self)
            logger.warning(f"{path}: cannot be written: {error.strerror}; the run continues without it")


def set_up_logging(rank: int | None = None) -> None:
    """A rank logs to standard output, a launcher (None) to standard error. Raises SettingError."""
    level = os.environ.get("LOG_LEVEL") or "INFO"
    if level not in LEVELS:
        raise SettingError(f"LOG_LEVEL={level}: is none of {', '.join(LEVELS)}")
    tqdm.set_lock(threading.RLock())  # its own is shared by forked processes, and stays held if one is killed
    handlers: list[logging.Handler] = [
        _Console("stderr" if rank is None else "stdout"),
        *([_File()] if rank == 0 else []),
    ]
    for handler in handlers:
        handler.setFormatter(_Formatter(rank))
        if rank:
            handler.addFilter(lambda record: record.levelno != logging.INFO and not hasattr(record, "of_rank_0"))
    logger.handlers = handlers
    logger.setLevel(level)
    logger.propagate = False


def log_warnings(lines: Sequence[str]) -> None:
    """As one message, from rank 0 alone, which a LOG_LEVEL of WARNING shows too."""
    if lines:
        logger.warning("\n".join(lines), extra={"of_rank_0": True})


def log_to(path: Path) -> None:
    """Append to a file what rank 0 has logged so far, and from now on."""
    for handler in [*logger.handlers]:
        if isinstance(handler, _File):
            handler.begin(path)


def log_at_once(message: str) -> None:
    """From a signal handler, which may have interrupted a write: straight to standard error."""
    record = logger.makeRecord(logger.name, logging.INFO, "", 0, message, (), None)
    with contextlib.suppress(OSError):
        os.write(2, f"{_Formatter(None).format(record)}\n".encode())
