"""Where DCP checkpoints are stored, and which of them are complete.

    <folder>/release/                              converted weights
    <folder>/iter_0000100/                         a training run's state after step 100
    <folder>/latest_checkpointed_iteration.txt     `release` or `100`, for other programs
    <folder>/best_checkpointed_iteration.txt       `100`: the best validation's, never removed

This program does not rely on the latest file: it looks for the newest complete checkpoint. A
checkpoint is written as `<name>.tmp` and then renamed. The last file in it, complete.json, lists
every file with its size, and those without tensors with their checksums (tensors.json has those of
tensors). A folder that lacks one of these files was interrupted and is never chosen. One that
contradicts itself is refused.
"""

import json
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.folders import file_sizes, move_aside, write_atomic
from qwen35.checkpoint.lock import removable
from qwen35.checkpoint.tensor_file import checksum
from qwen35.errors import read_object, read_text

FORMAT = 2  # format 1 had neither this field, nor tensors.json, nor checksums
MANIFEST = "complete.json"
TENSOR_INDEX = "tensors.json"
METADATA = ".metadata"  # written by DCP; kept open by every process that reads the checkpoint
LATEST = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
RELEASE = "release"
MAX_FILE_BYTES = 1 << 30  # of a file without tensors; tensors.json takes 40 bytes for a MiB of tensors
ITERATION = re.compile(r"iter_([0-9]{7,18})")


class IncompleteError(CheckpointError):
    """Part of a checkpoint is missing: writing or copying it was interrupted."""


def checkpoint_name(step: int | None) -> str:
    """The name of a checkpoint's folder; a step of None means converted weights."""
    return RELEASE if step is None else f"iter_{step:07}"


def manifest_content(folder: Path, step: int | None, world_size: int = 1) -> dict[str, Any]:
    """The content of complete.json for the files in a folder."""
    sizes = file_sizes(folder)
    sums = {name: checksum((folder / name).read_bytes()) for name in sizes if not name.endswith(".distcp")}
    content = {"format": FORMAT, "step": step, "world_size": world_size, "files": sizes, "crc32": sums}
    sums[MANIFEST] = _manifest_checksum(content)
    return content


def _manifest_checksum(content: Mapping[str, Any]) -> str:
    """The checksum of everything else in the manifest."""
    sums = {name: value for name, value in content["crc32"].items() if name != MANIFEST}
    numbers = [content[name] for name in ("format", "step", "world_size")]
    values = [sorted(content), *numbers, sorted(content["files"].items()), sorted(sums.items())]
    return checksum(json.dumps(values).encode())


def read_manifest(checkpoint: Path) -> Mapping[str, Any]:
    """The content of complete.json, compared with the files that are there.

    Raises IncompleteError if part of it is missing, CheckpointError if it contradicts itself.
    """
    file = checkpoint / MANIFEST
    content = read_object(file, IncompleteError)
    sizes, sums = content.get("files"), content.setdefault("crc32", {})
    if not (isinstance(sizes, dict) and METADATA in sizes and _holds(sizes, int) and _holds(sums, str)):
        raise IncompleteError(f"{file}: does not list the files of the checkpoint")
    for name, default in (("format", 1), ("step", None), ("world_size", 1)):
        if type(content.setdefault(name, default)) not in (int, type(default)):
            raise CheckpointError(f"{file}: {name}: {ascii(content[name])[:80]} is not a whole number")
    if content["format"] not in (1, FORMAT):
        raise CheckpointError(f"{file}: format {content['format']} is newer than this program; update it")
    is_checked = content["format"] == FORMAT or TENSOR_INDEX in sizes
    if is_checked and sums.get(MANIFEST) != _manifest_checksum(content):
        raise damaged(checkpoint, MANIFEST, "its checksum does not match its content")
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            raise IncompleteError(f"{path}: no such file")
        if path.stat().st_size != size:
            raise IncompleteError(f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {size}")
    is_named = checkpoint.name == RELEASE or ITERATION.fullmatch(checkpoint.name)
    if is_named and checkpoint.name != checkpoint_name(content["step"]):
        raise damaged(checkpoint, MANIFEST, f"it belongs to {checkpoint_name(content['step'])}")
    return content


def _holds(values: object, kind: type) -> bool:
    """Whether this is a dict from file names to values of this type."""
    return isinstance(values, dict) and all(
        name.isprintable() and len(name) < 256 and type(value) is kind for name, value in values.items()
    )


def damaged(checkpoint: Path, file: str, why: str) -> CheckpointError:
    """The error for a checkpoint that cannot be used; it names the one to use instead."""
    if checkpoint.name == RELEASE:
        instead = "convert the weights again"
    else:
        candidates = _candidates(checkpoint.parent)
        older = candidates[candidates.index(checkpoint) + 1 :] if checkpoint in candidates else []
        usable = next((path.name for path in older if is_complete(path)), None)
        instead = f"move it away to use {usable}" if usable else "move it away; no older checkpoint is complete"
    return CheckpointError(f"{checkpoint / file}: {why}; {instead}")


def read_file(checkpoint: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a file without tensors, checked. Raises CheckpointError."""
    path = checkpoint / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: cannot be read: not a file, or larger than {MAX_FILE_BYTES:,} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: {name} cannot be read: {error.strerror}") from None
    if manifest.get("format") == FORMAT and checksum(data) != manifest["crc32"].get(name):
        raise damaged(checkpoint, name, "is damaged: its checksum does not match")
    return data


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that complete.json lists is there in full, and it contradicts nothing."""
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


def find_checkpoints(folder: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The complete checkpoint of the highest step, else a complete `release`, else None.

    And the newer ones that are incomplete, with what is wrong. Raises CheckpointError for one that
    contradicts itself: no interruption does that, so it is not skipped silently.
    """
    skipped: list[tuple[Path, str]] = []
    for path in _candidates(Path(folder)):
        try:
            read_manifest(path)
            return path, skipped
        except IncompleteError as error:
            if path.is_dir():
                skipped.append((path, str(error)))
    return None, skipped


def newest_checkpoint(folder: str | Path) -> Path | None:
    """As `find_checkpoints`, which says more."""
    return find_checkpoints(folder)[0]


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, the newest first."""
    if not folder.is_dir():
        return []
    steps = {int(m[1]): path for path in folder.iterdir() if (m := ITERATION.fullmatch(path.name))}
    return [*(steps[step] for step in sorted(steps, reverse=True)), folder / RELEASE]


def resolve_load(path: str | Path) -> Path:
    """A checkpoint, or the newest complete one in a folder. Raises CheckpointError without one."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if path.name == RELEASE or ITERATION.fullmatch(path.name) or any((path / n).exists() for n in (MANIFEST, METADATA)):
        try:
            read_manifest(path)
        except IncompleteError as error:
            raise CheckpointError(f"{path}: not a complete checkpoint, was it interrupted? {error}") from None
        return path
    newest, skipped = find_checkpoints(path)
    if newest is None:
        broken = "".join(f"; {why}" for _, why in skipped)
        raise CheckpointError(f"{path}: no complete checkpoint in it ({RELEASE} or iter_… with {MANIFEST}){broken}")
    return newest


def load_notes(path: str | Path, chosen: Path) -> list[str]:
    """Messages about the checkpoint chosen in a folder: newer ones that were not, and the best."""
    folder = Path(path)
    if chosen.parent != folder:  # it was named itself, or is another folder's
        return []
    _, skipped = find_checkpoints(folder)
    lines = [f"{broken} is incomplete and was skipped ({why})" for broken, why in skipped]
    if (named := latest(folder)) not in (None, chosen.name):
        lines.append(f"{folder / LATEST} names {named}, but {chosen.name} is newer and complete, and is used")
    return lines + best_notes(folder, chosen)


def best_notes(path: str | Path, chosen: Path) -> list[str]:
    """A message if another checkpoint of a folder than the one chosen has the best validation."""
    best = Path(path) / (latest(Path(path), BEST) or chosen.name)
    if best == chosen or chosen.parent != Path(path) or not best.is_dir():
        return []
    return [f"{best} has the best validation: name it to use it instead of {chosen.name}, the newest"]


def latest(folder: Path, file: str = LATEST) -> str | None:
    """The name of the checkpoint in latest_checkpointed_iteration.txt; None if there is none."""
    try:
        text = read_text(folder / file, CheckpointError).strip()
    except CheckpointError:
        return None
    return text if text == RELEASE else checkpoint_name(int(text)) if re.fullmatch("[0-9]{1,18}", text) else None


def stamp(checkpoint: Path) -> dict[str, str]:
    """Its name, and a checksum that another checkpoint of that name would not have."""
    return {"name": checkpoint.name, "checksum": checksum((checkpoint / MANIFEST).read_bytes())}


def write_latest(folder: Path, step: int | None) -> None:
    write_atomic(folder / LATEST, RELEASE if step is None else str(step))


def write_best(folder: Path, step: int | None) -> None:
    """Name the checkpoint of the best validation, which must be complete; None: there is none."""
    if step is not None:
        write_atomic(folder / BEST, str(step))
    else:
        (folder / BEST).unlink(missing_ok=True)


def find_newest(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint from which a save folder's run goes on; newer incomplete ones, and why.

    Raises CheckpointError if all are incomplete: a run must not quietly start from scratch.
    """
    newest, skipped = find_checkpoints(folder)
    broken = [(path, why) for path, why in skipped if ITERATION.fullmatch(path.name)]
    if broken and newest is None:
        path, why = broken[0]
        raise CheckpointError(f"{folder}: no complete checkpoint in it; {why}. Move {path.name} away to start anew")
    return newest, broken


def keep_newest(folder: Path, limit: int) -> None:
    """Remove a run's complete checkpoints but the newest `limit`, the best and those being read.

    `release` and incomplete ones stay.
    """
    best = latest(folder, BEST)
    complete = [path for path in _candidates(folder) if path.name != RELEASE and is_complete(path)]
    for path in (path for path in complete[limit:] if path.name != best):
        with removable(path / METADATA) as is_free:
            gone = move_aside(path) if is_free else None
        if gone:  # now that none of its files is open: NFS would keep an open one
            shutil.rmtree(gone)
