"""Where DCP checkpoints lie, and which of them are whole.

    <folder>/release/                              converted weights
    <folder>/iter_0000100/                         a training run's state after step 100
    <folder>/latest_checkpointed_iteration.txt     `release` or `100`, for other programs: this one goes by what is there

Each is written as `<name>.tmp` and renamed; in it, complete.json is written last and lists every file with its size, and
those that hold no tensors with their checksums (of the tensors' bytes tensors.json has them, dcp_index.py).
A folder without it, or whose files are not all there in full, was interrupted and is never chosen. One that contradicts
itself is refused.
"""

import itertools
import json
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen35.checkpoint.checksums import checksum
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.folders import file_sizes, move_aside, remove_leftovers, write_atomic
from qwen35.checkpoint.lock import removable
from qwen35.errors import read_object, read_text

FORMAT = 2  # 1, which nobody wrote down, had no tensors.json and no checksums
MANIFEST = "complete.json"
TENSOR_INDEX = "tensors.json"
METADATA = ".metadata"  # DCP's own; who reads a checkpoint holds it open
LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"
MAX_FILE_BYTES = 1 << 30  # bytes of a file without tensors; tensors.json has 40 for a MiB of tensors
ITERATION = re.compile(r"iter_([0-9]{7,18})")


class IncompleteError(CheckpointError):
    """A checkpoint that is not all there, as when its writing or copying was interrupted."""


def checkpoint_name(step: int | None) -> str:
    """The name of a checkpoint's folder; None: converted weights."""
    return RELEASE if step is None else f"iter_{step:07}"


def manifest_content(folder: Path, step: int | None, world_size: int = 1) -> dict[str, Any]:
    """What complete.json says of the files that lie in a folder."""
    sizes = file_sizes(folder)
    sums = {name: checksum((folder / name).read_bytes()) for name in sizes if not name.endswith(".distcp")}
    content = {"format": FORMAT, "step": step, "world_size": world_size, "files": sizes, "crc32": sums}
    sums[MANIFEST] = _manifest_checksum(content)
    return content


def _manifest_checksum(content: Mapping[str, Any]) -> str:
    """Of all that it says but this."""
    sums = {name: value for name, value in content["crc32"].items() if name != MANIFEST}
    said = [
        sorted(content),
        content["format"],
        content["step"],
        content["world_size"],
        sorted(content["files"].items()),
        sorted(sums.items()),
    ]
    return checksum(json.dumps(said).encode())


def read_manifest(checkpoint: Path) -> Mapping[str, Any]:
    """The content of complete.json.

    Raises IncompleteError if the checkpoint is not whole, CheckpointError if it cannot be what it says that it is.
    """
    manifest = checkpoint / MANIFEST
    content = read_object(manifest, IncompleteError)
    sizes, sums = content.get("files"), content.setdefault("crc32", {})
    if not (isinstance(sizes, dict) and METADATA in sizes and _holds(sizes, int) and _holds(sums, str)):
        raise IncompleteError(f"{manifest}: does not say which files there are")
    for name, default in (("format", 1), ("step", None), ("world_size", 1)):
        if type(content.setdefault(name, default)) not in (int, type(default)):
            raise CheckpointError(f"{manifest}: {name}: {ascii(content[name])[:80]} is not a whole number")
    if content["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"{manifest}: format {content['format']}, which this version of the program does not know"
        )
    is_checked = content["format"] == FORMAT or TENSOR_INDEX in sizes
    if is_checked and sums.get(MANIFEST) != _manifest_checksum(content):
        raise damaged(checkpoint, MANIFEST, "its checksum is not that of what it says")
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            raise IncompleteError(f"{path}: no such file")
        if path.stat().st_size != size:
            raise IncompleteError(f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {size}")
    is_named = checkpoint.name == RELEASE or ITERATION.fullmatch(checkpoint.name)
    if is_named and checkpoint.name != checkpoint_name(content["step"]):
        raise damaged(checkpoint, MANIFEST, f"it is that of {checkpoint_name(content['step'])}")
    return content


def _holds(values: object, kind: type) -> bool:
    """Whether these are values of this kind by the names of files."""
    return isinstance(values, dict) and all(
        name.isprintable() and len(name) < 256 and type(value) is kind for name, value in values.items()
    )


def damaged(checkpoint: Path, file: str, why: str) -> CheckpointError:
    """What to say of a checkpoint that cannot be used, and what there is instead."""
    if checkpoint.name == RELEASE:
        instead = "convert the weights again"
    else:
        candidates = _candidates(checkpoint.parent)
        older = candidates[candidates.index(checkpoint) + 1 :] if checkpoint in candidates else []
        follows = next((path.name for path in older if is_complete(path)), None)
        instead = "move it away; " + (f"{follows} follows" if follows else "there is no older one that is whole")
    return CheckpointError(f"{checkpoint / file}: {why}; {instead}")


def read_file(checkpoint: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """A file that holds no tensors, as it was written. Raises CheckpointError."""
    path = checkpoint / name
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: cannot be read: not a file, or one of more than {MAX_FILE_BYTES:,} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: {name} cannot be read: {error.strerror}") from None
    if manifest.get("format") == FORMAT and checksum(data) != manifest["crc32"].get(name):
        raise damaged(checkpoint, name, "is damaged, its checksum is not that of what was written")
    return data


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that complete.json lists is there in full, and it contradicts nothing."""
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint of the highest step in a folder, else a whole `release`, else None.

    Raises CheckpointError where it contradicts itself: that is no trace of an interruption, and another is not taken for it.
    """
    for path in _candidates(Path(folder)):
        try:
            read_manifest(path)
        except IncompleteError:
            continue
        return path
    return None


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    steps = {int(m[1]): path for path in folder.iterdir() if (m := ITERATION.fullmatch(path.name))}
    return [*(steps[step] for step in sorted(steps, reverse=True)), folder / RELEASE]


def skipped_checkpoints(folder: Path, chosen: Path | None) -> Iterator[tuple[Path, str]]:
    """The checkpoints that would be chosen before this one if they were whole, and what is wrong with them."""
    for path in _candidates(folder):
        if path == chosen:
            return
        if path.is_dir():
            yield path, _damage(path)


def resolve_load(path: str | Path) -> Path:
    """The checkpoint that a path means: a checkpoint itself, or the newest whole one in the folder above, as a run takes it.

    Raises CheckpointError if there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if path.name == RELEASE or ITERATION.fullmatch(path.name) or any((path / n).exists() for n in (MANIFEST, METADATA)):
        try:
            read_manifest(path)
        except IncompleteError as error:
            raise CheckpointError(f"{path}: not a whole checkpoint, was it interrupted? {error}") from None
        return path
    found = newest_checkpoint(path)
    if found is None:
        broken = "".join(f"; {why}" for _, why in skipped_checkpoints(path, None))
        raise CheckpointError(f"{path}: no whole checkpoint in it ({RELEASE} or iter_… with {MANIFEST}){broken}")
    return found


def load_notes(path: str | Path, chosen: Path) -> list[str]:
    """What to tell of the checkpoint that was chosen in a folder: which others were not, and why."""
    folder = Path(path)
    if chosen.parent != folder:
        return []
    lines = [
        f"{broken} is passed over, for it is not whole ({why})" for broken, why in skipped_checkpoints(folder, chosen)
    ]
    if (latest := _latest(folder)) not in (None, chosen.name):
        lines.append(f"{folder / LATEST} names {latest}; {chosen.name} is taken, the newest that is whole")
    return lines


def _damage(checkpoint: Path) -> str:
    try:
        read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""


def _latest(folder: Path) -> str | None:
    """The name of the checkpoint that latest_checkpointed_iteration.txt names; None if it names none."""
    try:
        word = read_text(folder / LATEST, CheckpointError).strip()
    except CheckpointError:
        return None
    return word if word == RELEASE else checkpoint_name(int(word)) if re.fullmatch("[0-9]{1,18}", word) else None


def write_latest(folder: Path, step: int | None) -> None:
    write_atomic(folder / LATEST, RELEASE if step is None else str(step))


def repair_save_folder(folder: Path) -> list[str]:
    """Put a save folder, which is this job's alone, in order after jobs that were stopped. Returns what to tell.

    What is not whole and newer than what the run goes on from gets another name: it is kept, and in nobody's way.
    Raises CheckpointError if there is nothing else: to start anew would be no resume.
    """
    lines = remove_leftovers(folder, ITERATION)
    newest = newest_checkpoint(folder)
    broken = [(path, why) for path, why in skipped_checkpoints(folder, newest) if ITERATION.fullmatch(path.name)]
    if broken and newest is None:
        path, why = broken[0]
        raise CheckpointError(f"{folder}: no whole checkpoint in it; {why}. Move {path.name} away to start anew")
    for path, why in broken:
        aside = next(
            p for n in itertools.count() if not (p := path.with_name(f"{path.name}.damaged{n or ''}")).exists()
        )
        path.rename(aside)
        lines.append(f"{path} is not whole ({why}): it is now {aside.name}, and the run goes on from {newest}")
    if newest and ITERATION.fullmatch(newest.name) and _latest(folder) != newest.name:
        write_latest(folder, int(newest.name[5:]))
        lines.append(f"{folder / LATEST} names {newest.name} now, which was whole before it was named")
    return lines


def keep_newest(folder: Path, limit: int) -> None:
    """Remove the whole checkpoints of a run but the newest `limit`, and those that somebody is reading.

    `release` stays, and what is not whole: nobody knows what it is.
    """
    found = [path for path in _candidates(folder) if path.name != RELEASE and is_complete(path)]
    for path in found[limit:]:
        with removable(path / METADATA) as is_free:
            gone = move_aside(path) if is_free else None
        if gone:  # with no file of it open: NFS would keep that one
            shutil.rmtree(gone)
