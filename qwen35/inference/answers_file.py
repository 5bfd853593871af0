"""A file of answers that an interrupted run completes, and beside it what the answers depend on."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen35.checkpoint.folders import write_atomic
from qwen35.checkpoint.lock import BUSY, NO_LOCKS
from qwen35.errors import SettingError, naming, read_object, shortened
from qwen35.model import Qwen35

SAMPLED = 1024  # values at each end of a tensor that tell one model from another
SHOWN = 100  # characters of a value in a message
Write = Callable[[Sequence[Mapping[str, Any]]], None]


def recorded(path: Path) -> dict[str, Any]:
    """What the answers in a file were made with; {} if there are none. Raises SettingError."""
    if not path.is_file() or not path.stat().st_size:
        return {}
    absent = f"no such file, so that nobody knows what made the answers in {path.name}; give another OUT"
    return read_object(_settings_file(path), SettingError, absent)


def _settings_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def check_made_with(path: Path, made_with: Mapping[str, Any]) -> None:
    """Raises SettingError if there are answers in a file that were made with anything else."""
    before = recorded(path)
    changed = [
        f"{name}: {shortened(str(before.get(name)), SHOWN)} -> {shortened(str(value), SHOWN)}"
        for name, value in made_with.items()
        if before and before.get(name) != value
    ]
    if changed:
        raise SettingError(
            f"{path} holds answers that were made otherwise ({'; '.join(changed)}); ask as before, or give another OUT"
        )


def weights_digest(model: Qwen35) -> str:
    """Of names, types, shapes, and of the first and last values of each tensor."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for part in (tensor.flatten()[:SAMPLED], tensor.flatten()[-SAMPLED:]):
            total.update(part.float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


@contextmanager
def appending(path: Path, made_with: Mapping[str, Any], sources: Sequence[str]) -> Iterator[tuple[int, Write]]:
    """The number of records that need no answer any more, and what appends answers to the file.

    sources: of all records, in order; an answer names its own in "record". A last line that was
    only partly written is removed. Raises SettingError if the file was made otherwise, if it holds
    anything else than answers to these records in their order, or if another process writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in BUSY:
                raise SettingError(f"{path}: another process is writing it; wait for that, or stop it") from None
            if error.errno not in NO_LOCKS:
                raise
        check_made_with(path, made_with)
        file.seek(0)
        done, end = _answered(path, file, sources)
        file.truncate(end)
        if not end:
            write_atomic(_settings_file(path), json.dumps(made_with, indent=1) + "\n")

        def write(answers: Sequence[Mapping[str, Any]]) -> None:
            """All at once: a run that is killed has answered a whole batch, or nothing of it."""
            lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
            with naming(path):
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())

        yield done, write


def _answered(path: Path, lines: Iterable[bytes], sources: Sequence[str]) -> tuple[int, int]:
    """-> how many of the records have an answer or were left out, and where the whole lines end."""
    done = end = 0
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            done = sources.index(json.loads(line)["record"], done) + 1
        except (ValueError, TypeError, KeyError):
            wrong = f"{path}: line {number} is not the answer that belongs there; give another OUT"
            raise SettingError(wrong) from None
        end += len(line)
    return done, end
