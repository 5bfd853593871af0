"""Locks: a save folder has one owner, who removes no checkpoint that another job is reading.

The filelock library locks only a file, which is no lock once somebody removes it, and which forked
workers keep.
"""

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
    is_new, path, warning = not folder.exists(), folder / LOCK, None
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file, _opened(folder) as above:
            if _wait_for(fcntl.lockf, file.fileno(), path) is None:
                warning = f"{path}: this file system has no locks; nothing keeps a second job out of the folder"
            _wait_for(fcntl.flock, above, path)
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


def take(lock: Callable[[int, int], object], fd: int, kind: int) -> bool | None:
    """Whether the lock was free, and is taken now; None if the file system has no locks."""
    try:
        lock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in BUSY:
            return False
        raise
    return True


def _wait_for(lock: Callable[[int, int], object], fd: int, path: Path) -> bool | None:
    end = time.monotonic() + LOCK_TIMEOUT
    while (taken := take(lock, fd, fcntl.LOCK_EX)) is False:
        if time.monotonic() > end:
            try:
                owner = "process {pid} on {host}".format(**json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError):
                owner = "unknown"
            raise CheckpointError(
                f"{path.parent} is in use by another job ({owner}); wait for it, or choose another folder"
            )
        time.sleep(0.1)
    return taken


def hold_for_reading(path: Path) -> int:
    """Open a file so that `removable` yields False until it is closed. Returns its descriptor."""
    fd = os.open(path, os.O_RDONLY)
    take(fcntl.flock, fd, fcntl.LOCK_SH)  # if it is being removed, the next read will say that it is missing
    return fd


@contextmanager
def removable(path: Path) -> Iterator[bool]:
    """Whether nobody holds a file for reading; if so, nobody can until the block ends.

    This lock belongs to the open file, not to the process: one process may hold the same file
    several times.
    """
    with path.open("r+b") as file:
        yield take(fcntl.flock, file.fileno(), fcntl.LOCK_EX) is not False
