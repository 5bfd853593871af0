"""Where Triton keeps what it has compiled, on each machine: whose it is, and who compiles into it.

triton-ascend 3.2.0 writes a header for all kernels (precompiled.h, and then what the C++ compiler makes of it, a .gch: its
make_npu_launcher_stub) where other processes find it half written, and never writes it again where it is there at all.
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
LOCK = ".compiling"  # holds the process that compiles, nothing else
HEADER = "precompiled.h"


class CacheError(UserError):
    """A folder that Triton's cache cannot be in."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """As Triton finds it."""
    home = Path(environment.get("TRITON_HOME") or Path.home())
    return Path(environment.get(VARIABLE, "").strip() or home / ".triton/cache")


def unfit(folder: Path) -> str | None:
    """Why a folder cannot be it. What lies there is loaded and run: nobody else may write it. None: it can, or is not there."""
    if not os.path.lexists(folder):
        return None
    link, found = folder.lstat(), folder.stat()
    if others := {link.st_uid, found.st_uid} - {os.getuid()}:
        return f"it belongs to user {others.pop()}, this process to {os.getuid()}"
    if not stat.S_ISDIR(found.st_mode):
        return "it is no folder"
    writes = found.st_mode & 0o022
    return f"others may write there: its mode is {found.st_mode & 0o777:o}" if writes else None


@contextmanager
def compiling(folder: Path, waits: Callable[[str], object]) -> Iterator[None]:
    """Hold the cache (made if need be) until the block ends, or this process does, kill -9 included.

    waits: is told, again and again, which process has it. What one that was killed may have left half written is removed.
    Raises CacheError, OSError.
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
        while not _taken(file.fileno(), folder):
            file.seek(0)
            waits(file.read())
            time.sleep(0.2)
        file.seek(0)
        if file.read():  # whoever wrote it did not come to an end
            for header in folder.glob(f"*/{HEADER}"):
                shutil.rmtree(header.parent)
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield
        file.truncate(0)


def _taken(fd: int, folder: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise CacheError(
            f"{VARIABLE}={folder}: this file system has no locks ({error.strerror}); name a local folder"
        ) from None
