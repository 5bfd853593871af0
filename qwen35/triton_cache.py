"""Triton's folder of compiled kernels on this machine: who owns it, and who may compile into it.

Compilation needs a lock: triton-ascend 3.2.0 (make_npu_launcher_stub) writes a header for all
kernels, precompiled.h, and its compiled form, a .gch, in a place where other processes find them
half written, and never rewrites a file that exists.
"""

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qwen35.errors import UserError

VARIABLE = "TRITON_CACHE_DIR"
LOCK = ".compiling"  # contains the id of the process that compiles, or nothing
HEADER = "precompiled.h"


class CacheError(UserError):
    """A folder that must not be Triton's cache."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder that Triton itself would choose."""
    home = Path(environment.get("TRITON_HOME") or Path.home())
    return Path(environment.get(VARIABLE, "").strip() or home / ".triton/cache")


def unfit(folder: Path) -> str | None:
    """Why a folder must not be the cache, whose files are run; None: it may, or is missing."""
    if not os.path.lexists(folder):
        return None
    link, found = folder.lstat(), folder.stat()
    if others := {link.st_uid, found.st_uid} - {os.getuid()}:
        return f"it belongs to user {others.pop()}, this process to {os.getuid()}"
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a folder"
    others_write = found.st_mode & 0o022
    return f"others may write there: its mode is {found.st_mode & 0o777:o}" if others_write else None


@contextmanager
def compiling(folder: Path, on_wait: Callable[[str], object]) -> Iterator[None]:
    """Lock the cache (made if need be) until the block or this process ends, even by kill -9.

    on_wait: called repeatedly with the id of the process that holds the lock. Removes what a killed
    process may have left half written. Raises CacheError, OSError.
    """
    if not (why := unfit(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        why = unfit(folder)
    if why:
        raise CacheError(
            f"{VARIABLE}={folder}: Triton would load and run what lies there, and {why}; name another folder"
        )
    with (folder / LOCK).open("a+") as file:
        while not _try_lock(file.fileno(), folder):
            file.seek(0)
            on_wait(file.read())
            time.sleep(0.2)
        file.seek(0)
        if file.read():  # the process that wrote it was killed
            for header in folder.glob(f"*/{HEADER}"):
                shutil.rmtree(header.parent)
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield
        file.truncate(0)


def _try_lock(fd: int, folder: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise CacheError(
            f"{VARIABLE}={folder}: this file system has no locks ({error.strerror}); name a local folder"
        ) from None
