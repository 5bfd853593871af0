"""Locks: a save folder has one owner, who removes no checkpoint that another job is reading."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen35.checkpoint.errors import CheckpointError

LOCK = ".lock"
LOCK_TIMEOUT = 5.0  # seconds; a job that was just killed may still be exiting
BUSY = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF)  # the last: locking a folder over NFS


@contextmanager
def holding(folder: Path) -> Iterator[str | None]:
    """Lock a folder, created if needed, until the block or this process ends, even by kill -9.

    Yields None, or a one-line warning if the file system has no locks. A folder that was created
    here is removed again if the block leaves it empty. Raises CheckpointError if another job holds
    the lock.

    The lock is a POSIX record lock: it ends with the process, is not inherited by forked DataLoader
    workers, and works over NFS. A second lock, on the folder itself, keeps others out even if the
    file is removed; NFS lacks this kind.
    """
    is_new = not folder.exists()
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file, _opened(folder) as above:
            warning = _acquire(fcntl.lockf, file.fileno(), path)
            _acquire(fcntl.flock, above, path)
            if not (_is_same_file(path, file.fileno()) and _is_same_file(folder, above)):
                continue  # the job that held them removed file or folder: these locks protect nothing
            try:
                if warning is None:
                    _write_owner(file.fileno(), path)
                yield warning
            finally:
                is_ours = is_new and _is_same_file(folder, above)  # another job may have made it anew
                if is_ours and [entry.name for entry in folder.iterdir()] == [LOCK]:
                    path.unlink()
                    with suppress(OSError):  # another job may have put something there
                        folder.rmdir()
            return


def _write_owner(fd: int, path: Path) -> None:
    """Write host and process id, unbuffered: a failed write must not be retried on close."""
    try:
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None


def _is_same_file(path: Path, fd: int) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        yield fd
    finally:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # forked workers share this lock, so closing is not enough
        os.close(fd)


def _acquire(lock: Callable[[int, int], object], fd: int, path: Path) -> str | None:
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return f"{path}: this file system has no locks; nothing keeps a second job out of the folder"
            if error.errno not in BUSY:
                raise
        if time.monotonic() > end:
            raise CheckpointError(
                f"{path.parent} is in use by another job ({_owner(path)}); wait for it, or choose another folder"
            )
        time.sleep(0.1)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def hold_for_reading(path: Path) -> int:
    """Open a file so that `removable` yields False until it is closed. Returns its descriptor."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        # busy: the checkpoint is being removed, and the next read will say that it is missing
        if error.errno not in (*NO_LOCKS, *BUSY):
            os.close(fd)
            raise
    return fd


@contextmanager
def removable(path: Path) -> Iterator[bool]:
    """Whether nobody holds a file for reading; if so, nobody can until the block ends.

    This lock belongs to the open file, not to the process: one process may hold the same file
    several times.
    """
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = True
    except OSError as error:
        if error.errno not in (*NO_LOCKS, *BUSY):
            os.close(fd)
            raise
        is_free = error.errno in NO_LOCKS
    try:
        yield is_free
    finally:
        os.close(fd)
