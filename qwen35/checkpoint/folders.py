"""Folders that exist completely or not at all: written under another name, flushed, then renamed.

Each holds a manifest, a JSON file that lists the files this program wrote. The parameter `manifest`
is the name of that file.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen35.checkpoint.errors import CheckpointError, abbreviate
from qwen35.checkpoint.lock import LOCK, holding
from qwen35.errors import naming, read_object

INCOMPLETE = ".incomplete"  # a file in each folder that is being written or replaced


def begin(folder: Path, manifest: str) -> Path:
    """Make the empty temporary folder that `commit` turns into `folder`.

    Raises CheckpointError like `check_replaceable`.
    """
    old = _replaced(folder)
    if not folder.exists() and (old / INCOMPLETE).is_file():  # a job was stopped between the two renames of `commit`
        old.rename(folder)
        (folder / INCOMPLETE).unlink()
    check_replaceable(folder, manifest)
    temporary = temporary_name(folder)
    if temporary.exists():
        _clear(temporary, keep=LOCK)
    temporary.mkdir(parents=True, exist_ok=True)
    (temporary / INCOMPLETE).touch()
    return temporary


def check_replaceable(folder: Path, manifest: str) -> None:
    """Raise CheckpointError unless `folder` is absent, empty, or holds only files of its manifest.

    Files of others would be lost, also under the names that replacing needs.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / manifest).is_file() or not any(folder.iterdir()))):
        raise CheckpointError(
            f"{folder} exists already and was not written by this program; choose another folder, or move it away"
        )
    if (folder / manifest).is_file():
        listed = read_object(folder / manifest, CheckpointError).get("files")
        if not isinstance(listed, dict | list):
            raise CheckpointError(f"{folder} exists already, and its {manifest} does not list its files; move it away")
        foreign = [name for name in file_sizes(folder) if name != manifest and name not in listed]
        if foreign:
            count, them = (f"{len(foreign)} files", "them") if len(foreign) > 1 else ("a file", "it")
            raise CheckpointError(
                f"{folder} exists already, with {count} that this program did not write: {abbreviate(foreign)}; "
                f"choose another folder, or move {them} away"
            )
    old, temporary = _replaced(folder), temporary_name(folder)
    if folder.exists() and old.exists() and any(old.iterdir()) and not (old / INCOMPLETE).is_file():
        raise CheckpointError(f"{old} is in the way of replacing {folder}; move it away")
    is_ours = any((temporary / name).exists() for name in (INCOMPLETE, LOCK, manifest))
    if temporary.exists() and any(temporary.iterdir()) and not is_ours:
        raise CheckpointError(f"{temporary} is in the way and was not written by this program; move it away")


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> size of all files below a folder, without INCOMPLETE and LOCK."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = {str(path.relative_to(folder)): path.lstat().st_size for path in paths}
    return {name: size for name, size in names.items() if name not in (INCOMPLETE, LOCK)}


def behind_link(folder: Path) -> Path:
    """What is to be written: a link stays, and its target is replaced."""
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


def temporary_name(folder: Path) -> Path:
    """The name of `folder` while it is written."""
    return folder.with_name(folder.name + ".tmp")


def _replaced(folder: Path) -> Path:
    """The name of the old `folder` while it is replaced; INCOMPLETE tells it from a user's copy."""
    return folder.with_name(folder.name + ".old")


def _clear(folder: Path, keep: str) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()


def _remove_replaced(old: Path) -> None:
    """Remove INCOMPLETE last, so that what a stopped job leaves can still be recognized."""
    _clear(old, keep=INCOMPLETE)
    shutil.rmtree(old)


def check_free_space(out: Path, needed: int) -> None:
    """Raises CheckpointError if a folder, which need not exist, cannot take so many bytes."""
    free = shutil.disk_usage(next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())).free
    if free < needed:
        raise CheckpointError(f"{out}: takes {needed:,} bytes, and {free:,} are free on that disk")


def check_disjoint(original: Path, out: Path) -> None:
    """Raise CheckpointError if one folder is inside the other, or both are the same."""
    if original.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(original.resolve()):
        raise CheckpointError(f"{out} and the original {original} must be two folders, neither inside the other")


def commit(temporary: Path, folder: Path, manifest: str, content: Mapping[str, Any]) -> None:
    """Flush all files, write the manifest last, and rename the folder, replacing an old one."""
    for path in temporary.rglob("*"):
        if path.is_file():
            flush(path)
    write_atomic(temporary / manifest, json.dumps(content, indent=2) + "\n")
    (temporary / INCOMPLETE).unlink()
    (temporary / LOCK).unlink(missing_ok=True)  # a job waiting for the lock notices this and starts over
    flush(temporary)
    if folder.exists():
        old = _replaced(folder)
        if old.exists():
            _remove_replaced(old)
        (folder / INCOMPLETE).touch()
        folder.rename(old)
        temporary.rename(folder)
        _remove_replaced(old)
    else:
        temporary.rename(folder)
    flush(folder.parent)


def move_aside(folder: Path) -> Path:
    """Rename a folder that is about to be removed, so that no half-removed one bears its name."""
    gone = folder.with_name(folder.name + ".gone")
    if gone.exists():
        shutil.rmtree(gone)
    folder.rename(gone)
    flush(folder.parent)
    return gone


def remove_leftovers(folder: Path, names: re.Pattern) -> list[str]:
    """Clean up what interrupted jobs left of folders whose names match. Returns messages.

    This job must own the lock. Half-written and half-removed folders are removed; one that was
    being replaced is restored.
    """
    messages = []
    for path in sorted(folder.iterdir()):
        final = path.with_suffix("")
        if not names.fullmatch(final.name):
            continue
        if path.suffix == ".tmp" and (path / INCOMPLETE).is_file():
            shutil.rmtree(path)
            messages.append(f"removed {path}, which a stopped job had not finished")
        elif path.suffix == ".gone":
            shutil.rmtree(path)
        elif path.suffix == ".old" and (path / INCOMPLETE).is_file():  # without it: a copy that a user keeps
            if final.exists():
                _remove_replaced(path)
                continue
            path.rename(final)
            (final / INCOMPLETE).unlink()
            messages.append(f"{final} is back: a job was stopped while replacing it")
    return messages


@contextmanager
def locked(folder: Path, manifest: str) -> Iterator[None]:
    """Keep other processes from writing `folder`, which must be replaceable.

    A second one waits, and after LOCK_TIMEOUT raises CheckpointError.
    """
    check_replaceable(folder, manifest)  # before a lock file is put where it may not belong
    with holding(temporary_name(folder)) as warning:
        if warning:
            print(warning, flush=True)
        yield


@contextmanager
def new_folder(folder: Path, manifest: str, content: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder for the block to fill: committed at its end, removed if it fails.

    `content` is the manifest's.
    """
    folder = behind_link(folder)
    with locked(folder, manifest):
        temporary = begin(folder, manifest)
        try:
            yield temporary
            commit(temporary, folder, manifest, content)
        except BaseException:  # KeyboardInterrupt too
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file so that it always has its old or its new content. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_soon(fd: int, begin: int, length: int) -> None:
    """Start writing bytes of a file to disk without waiting, so that its final flush is quick."""
    os.posix_fadvise(fd, begin, length, os.POSIX_FADV_DONTNEED)  # Linux writes pages before it drops them
