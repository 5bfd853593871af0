"""Where DCP checkpoints lie, and which of them are whole.

    <folder>/release/                              converted weights
    <folder>/iter_0000100/                         a training run's state after step 100
    <folder>/latest_checkpointed_iteration.txt     `release` or `100`

Each is written as `<name>.tmp` and renamed; in it, complete.json is written last and lists every file with its size.
A folder without it, or whose files are not all there in full, was interrupted and is never chosen.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.folders import set_aside, write_atomic
from qwen35.checkpoint.lock import removable
from qwen35.errors import read_object

MARKER = "complete.json"
METADATA = ".metadata"  # DCP's own; who reads a checkpoint holds it open
LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"
ITERATION = re.compile(r"iter_(\d{7,})")


def checkpoint_name(step: int | None) -> str:
    """The name of a checkpoint's folder; None: converted weights."""
    return RELEASE if step is None else f"iter_{step:07}"


def marker_content(folder: Path, **facts: Any) -> dict[str, Any]:
    """What complete.json says of the files that lie in a folder, and `facts` (step, world_size, …)."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return {**facts, "files": {name: size for name, size in files.items() if name != ".incomplete"}}


def whole(checkpoint: Path) -> Mapping[str, Any] | None:
    """The content of complete.json if the checkpoint is whole, else None."""
    try:
        return read_marker(checkpoint)
    except CheckpointError:
        return None


def read_marker(checkpoint: Path) -> Mapping[str, Any]:
    """The content of complete.json. Raises CheckpointError if the checkpoint is not whole."""
    content = read_object(checkpoint / MARKER, CheckpointError)
    sizes = content.get("files")
    if not isinstance(sizes, dict) or ".metadata" not in sizes:
        raise CheckpointError(f"{checkpoint / MARKER}: does not say which files there are")
    for name, default in (("step", None), ("world_size", 1)):
        if type(content.get(name, default)) not in (int, type(default)):
            raise CheckpointError(f"{checkpoint / MARKER}: {name}: {str(content[name])[:80]} is not a whole number")
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, {MARKER} says {size}")
    return content


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint of the highest step in a folder, else a whole `release`, else None."""
    return next((path for path in _candidates(Path(folder)) if whole(path)), None)


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    steps = {int(m[1]): path for path in folder.iterdir() if (m := ITERATION.fullmatch(path.name))}
    return [*(steps[step] for step in sorted(steps, reverse=True)), folder / RELEASE]


def resolve_load(path: str | Path) -> Path:
    """The checkpoint that a path means: a checkpoint itself, or the folder above.

    In the folder above, latest_checkpointed_iteration.txt says which (so it may be edited by hand to go back); if it
    is absent, or what it names is not whole, the newest whole one is meant. Raises CheckpointError if there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if whole(path):
        return path
    if path.name == RELEASE or ITERATION.fullmatch(path.name) or (path / ".metadata").exists():
        raise CheckpointError(f"{path}: not a whole checkpoint, was it interrupted? {_damage(path)}")
    named = named_by_latest(path)
    found = named if named and whole(named) else newest_checkpoint(path)
    if found is None:
        broken = "; ".join(_damage(one) for one in _candidates(path) if one.is_dir())
        raise CheckpointError(
            f"{path}: no whole checkpoint in it ({RELEASE} or iter_… with {MARKER})" + (f"; {broken}" if broken else "")
        )
    return found


def _damage(checkpoint: Path) -> str:
    try:
        read_marker(checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""


def named_by_latest(folder: Path) -> Path | None:
    """The checkpoint that latest_checkpointed_iteration.txt names, whole or not; None if it names none."""
    try:
        word = (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if word == RELEASE:
        return folder / RELEASE
    return folder / checkpoint_name(int(word)) if word.isdecimal() else None


def write_latest(folder: Path, step: int | None) -> None:
    write_atomic(folder / LATEST, RELEASE if step is None else str(step))


def keep_newest(folder: Path, limit: int) -> None:
    """Remove the whole checkpoints of a run but the newest `limit`, and those that somebody is reading.

    `release` stays, and what is not whole: nobody knows what it is.
    """
    found = [path for path in _candidates(folder) if path.name != RELEASE and whole(path)]
    for path in found[limit:]:
        with removable(path / METADATA) as is_free:
            gone = set_aside(path) if is_free else None
        if gone:  # with no file of it open: NFS would keep that one
            shutil.rmtree(gone)
