"""Folders that are there whole or not at all: written under another name, flushed, renamed."""

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

INCOMPLETE = ".incomplete"  # lies in a folder that is being written


def begin(folder: Path, manifest: str) -> Path:
    """Make the empty temporary folder that `commit` turns into `folder`; what an interrupted run left of it is removed.

    Raises CheckpointError as `check_replaceable`.
    """
    old = _replaced(folder)
    if not folder.exists() and (old / INCOMPLETE).is_file():  # a job was stopped between the two renames of `commit`
        old.rename(folder)
        (folder / INCOMPLETE).unlink()
    check_replaceable(folder, manifest)
    temporary = _temporary(folder)
    if temporary.exists():
        _clear(temporary, keep=LOCK)
    temporary.mkdir(parents=True, exist_ok=True)
    (temporary / INCOMPLETE).touch()
    return temporary


def check_replaceable(folder: Path, manifest: str) -> None:
    """Raise CheckpointError unless `folder` is absent, empty, or holds what we wrote, as its `marker` says, and nothing else.

    What others put there would be lost. So would what bears a name that the replacing needs.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / manifest).is_file() or not any(folder.iterdir()))):
        raise CheckpointError(
            f"{folder} is there already, and was not written by this program; choose another or move it"
        )
    if (folder / manifest).is_file():
        written = read_object(folder / manifest, CheckpointError).get("files")
        if not isinstance(written, dict | list):
            raise CheckpointError(
                f"{folder} is there already, and {manifest} does not say what was written there; move it"
            )
        strange = [name for name in file_sizes(folder) if name != manifest and name not in written]
        if strange:
            count, them = (f"{len(strange)} files", "them") if len(strange) > 1 else ("a file", "it")
            raise CheckpointError(
                f"{folder} is there already, with {count} that this program did not write: {abbreviate(strange)}; "
                f"choose another folder, or move {them} away"
            )
    old, temporary = _replaced(folder), _temporary(folder)
    if folder.exists() and old.exists() and any(old.iterdir()) and not (old / INCOMPLETE).is_file():
        raise CheckpointError(f"{old} is in the way of replacing {folder}; move it")
    is_ours = any((temporary / name).exists() for name in (INCOMPLETE, LOCK, manifest))
    if temporary.exists() and any(temporary.iterdir()) and not is_ours:
        raise CheckpointError(f"{temporary} is in the way, and was not written by this program; move it")


def file_sizes(folder: Path) -> dict[str, int]:
    """The files in and below a folder by name, but for what is there only while it is written."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = {str(path.relative_to(folder)): path.lstat().st_size for path in paths}
    return {name: size for name, size in names.items() if name not in (INCOMPLETE, LOCK)}


def _temporary(folder: Path) -> Path:
    """What `folder` is called while it is written."""
    return folder.with_name(folder.name + ".tmp")


def _replaced(folder: Path) -> Path:
    """What `folder` is called while another takes its place; it then holds INCOMPLETE, unlike a copy that a user keeps."""
    return folder.with_name(folder.name + ".old")


def _clear(folder: Path, keep: str) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()


def _remove_replaced(old: Path) -> None:
    """INCOMPLETE goes last: what a stopped job leaves of it is still known for what it is."""
    _clear(old, keep=INCOMPLETE)
    shutil.rmtree(old)


def check_disjoint(original: Path, out: Path) -> None:
    """Raise CheckpointError if one lies in the other: what is written would become a part of the original."""
    if original.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(original.resolve()):
        raise CheckpointError(f"{out} and the original {original} must be two folders, neither inside the other")


def commit(temporary: Path, folder: Path, manifest: str, content: Mapping[str, Any]) -> None:
    """Flush what was written, add the marker (last), and put the folder in its place, instead of one that is there."""
    for path in temporary.rglob("*"):
        if path.is_file():
            flush(path)
    write_atomic(temporary / manifest, json.dumps(content, indent=2) + "\n")
    (temporary / INCOMPLETE).unlink()
    (temporary / LOCK).unlink(missing_ok=True)  # who waits for it finds that it is gone, and looks again
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
    """The new name of a folder that is to be removed: one that is half removed never bears its own."""
    gone = folder.with_name(folder.name + ".gone")
    if gone.exists():
        shutil.rmtree(gone)
    folder.rename(gone)
    flush(folder.parent)
    return gone


def remove_leftovers(folder: Path, names: re.Pattern) -> list[str]:
    """Tidy up what interrupted jobs left of folders of these names, inside one that is this job's alone.

    What is half-written or half-removed goes; a folder that was being replaced comes back. Returns a line for what matters.
    """
    told = []
    for path in sorted(folder.iterdir()):
        whole = path.with_suffix("")
        if not names.fullmatch(whole.name):
            continue
        if path.suffix == ".tmp" and (path / INCOMPLETE).is_file():
            shutil.rmtree(path)
            told.append(f"removed {path}, which a stopped job had not finished")
        elif path.suffix == ".gone":
            shutil.rmtree(path)
        elif path.suffix == ".old" and (path / INCOMPLETE).is_file():  # without, it is a copy that a user keeps
            if whole.exists():
                _remove_replaced(path)
                continue
            path.rename(whole)
            (whole / INCOMPLETE).unlink()
            told.append(f"{whole} is back: a job was stopped while it replaced it")
    return told


@contextmanager
def new_folder(folder: Path, manifest: str, content: dict[str, Any]) -> Iterator[Path]:
    """The temporary folder for the body to fill; committed at its end, removed if it fails. `content` is the marker's.

    Another process that writes the same folder waits, and is refused with CheckpointError if that takes long.
    """
    if folder.is_symlink():  # it stays, and what it leads to is replaced
        folder = Path(os.path.realpath(folder))
    check_replaceable(folder, manifest)  # before a lock is put into what may be another's
    with holding(_temporary(folder)) as warning:
        if warning:
            print(warning, flush=True)
        temporary = begin(folder, manifest)
        try:
            yield temporary
            commit(temporary, folder, manifest, content)
        except BaseException:  # KeyboardInterrupt too
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that it has its old content or the new, whatever happens. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    try:
        with naming(path):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_soon(fd: int, begin: int, length: int) -> None:
    """Have the disk start on bytes just written to a file, without waiting: the flush at the end then has little left."""
    os.posix_fadvise(fd, begin, length, os.POSIX_FADV_DONTNEED)  # Linux writes them out before it may drop them
