"""A save folder belongs to one job at a time."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen35.checkpoint.errors import CheckpointError

LOCK = ".lock"
PATIENCE = 5.0  # seconds that a job that was just killed may take to be gone
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def holding(folder: Path) -> Iterator[str | None]:
    """Keep other jobs out of a save folder (made if need be) until the block ends, or this process does, kill -9 included.

    Yields None, or one line of warning where the file system has no locks. A folder that was made for this and that the
    block leaves empty is removed again. Raises CheckpointError if another job has it.

    A POSIX record lock: it goes with the process, is not handed to the loader's forked workers, and works over NFS.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("a+") as file:
        warning = _take(file.fileno(), path)
        try:
            if warning is None:
                file.truncate(0)
                file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
                file.flush()
            yield warning
        finally:
            if is_new and [entry.name for entry in folder.iterdir()] == [LOCK]:
                path.unlink()
                folder.rmdir()


def _take(fd: int, path: Path) -> str | None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return f"{path}: this file system has no locks; nothing keeps a second job out of the folder"
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > end:
            raise CheckpointError(
                f"{path.parent} is in use by another job ({_owner(path)}); wait for it, or name another save"
            )
        time.sleep(0.1)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
