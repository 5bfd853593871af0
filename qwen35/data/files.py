"""The JSON files of a model folder, and files written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen35.config import SettingError


def read_config(folder: str | Path, name: str) -> dict[str, Any]:
    """`name` of a model folder. Raises SettingError if it is not there or no JSON object."""
    path = Path(folder) / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise SettingError(f"{path}: no such file; model_name_or_path names a whole Hugging Face folder") from None
    except ValueError as error:
        raise SettingError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SettingError(f"{path}: not a JSON object")
    return value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place when the block ends well and is removed when it does not.

    Several processes may write the same at once: the last one stands. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
