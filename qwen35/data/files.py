"""The JSON files of a model folder, and files that are written whole or not at all."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen35.config.layout import TEXT_ONLY
from qwen35.errors import SettingError, read_object, read_text

PROCESSOR = "processor_config.json"
YARN_LENGTH = "original_max_position_embeddings"
SIZES = ("size", "min_pixels", "max_pixels", "fps", "max_frames", "num_frames", "max_video_tokens")


def read_config(folder: str | Path, name: str) -> dict[str, Any]:
    """A JSON file of a model folder. Raises SettingError if it is missing or not a JSON object."""
    absent = "no such file; model_name_or_path must name a whole Hugging Face folder"
    return read_object(Path(folder) / name, SettingError, absent)


def is_text_only(folder: str | Path) -> bool:
    """Whether a model folder's config.json is of a model without a vision tower. SettingError."""
    return read_config(folder, "config.json").get("model_type") in TEXT_ONLY


def read_processor(folder: str | Path, section: str, *names: str) -> tuple[dict[str, Any], str]:
    """A processor's config, and where it was found, for messages. Raises SettingError.

    As in transformers, a section of processor_config.json, which transformers 5 saves, comes before
    the files `names`, of which the first that exists is read.
    """
    path = Path(folder) / PROCESSOR
    if path.is_file() and (config := read_object(path, SettingError).get(section)) is not None:
        if not isinstance(config, dict):
            raise SettingError(f"{path}: {section}: {str(config)[:80]} is not an object")
        return config, f"{path}: {section}"
    name = next((name for name in names if (Path(folder) / name).is_file()), names[-1])
    return read_config(folder, name), f"{folder}/{name}"


def ignored_sizes(folder: str | Path, least: int, most: int, section: str, *names: str) -> str | None:
    """A message about the sizes in a processor's config, which are not read; None if they agree.

    The recipe sets them instead: least and most are its pixels. In a config, min_pixels and
    max_pixels mean the edges of `size`. Raises SettingError.
    """
    config, where = read_processor(folder, section, *names)
    sizes = {key: config[key] for key in SIZES if config.get(key) is not None}
    size = sizes.get("size")
    size = dict(size) if isinstance(size, dict) else {}
    edges = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    size |= {edge: sizes[key] for key, edge in edges if key in sizes}
    agrees = size == {"shortest_edge": least, "longest_edge": most} and not sizes.keys() - {"size", *SIZES[1:3]}
    if not sizes or agrees:
        return None
    return f"{where}: not read: {', '.join(f'{key} {value}'[:80] for key, value in sizes.items())}"


def longest_context(folder: str | Path) -> float:
    """How many tokens the model of a config.json is made to read; infinity if it does not say."""
    config = read_config(folder, "config.json")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    values = text.get("max_position_embeddings"), rope.get(YARN_LENGTH), rope.get("factor")
    most, trained, factor = (value if isinstance(value, int | float) else 0 for value in values)
    return max(most, trained * factor) or float("inf")


def longest_text(folder: str | Path) -> float:
    """How many tokens a tokenizer_config.json allows a text, as vLLM reads it; infinity if any."""
    value = read_config(folder, "tokenizer_config.json").get("model_max_length")
    return value if isinstance(value, int | float) and value > 0 else float("inf")


def read_chat_template(folder: str | Path) -> tuple[str, str] | None:
    """A model folder's chat template and the file that holds it, or None. Raises SettingError.

    Tokenizers prefer chat_template.jinja to tokenizer_config.json, processors prefer
    chat_template.json to both, and servers use either class, so the templates must not differ.
    Several named templates are refused: which one is used would depend on the conversation.
    """
    folder, found = Path(folder), {}
    for name in ("chat_template.json", PROCESSOR, "chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file() or (name == "tokenizer_config.json" and "chat_template.jinja" in found):
            continue
        if path.suffix == ".jinja":
            found[name] = read_text(path, SettingError)
        elif (text := read_object(path, SettingError).get("chat_template")) is not None:
            found[name] = text
    if any(not isinstance(text, str) for text in found.values()) or any(folder.glob("additional_chat_templates/*")):
        raise SettingError(f"{folder}: has several chat templates; keep one, as chat_template.jinja")
    if len(set(found.values())) > 1:
        raise SettingError(
            f"{folder}: {' and '.join(found)} hold different chat templates; keep one, chat_template.jinja"
        )
    return next(((text, str(folder / name)) for name, text in found.items()), None)


@contextmanager
def replacing(path: Path, keep_first: bool = False) -> Iterator[Path]:
    """A temporary file beside `path`, which is renamed to it if the block succeeds, else removed.

    Several processes, also on several nodes, may write the same path: the last file stays, or with
    keep_first the first, so that no reader on a network file system loses the file that it has
    open. Raises OSError, also if `path` exists and is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "exists and is not a regular file", str(path))
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    temporary.touch(exist_ok=False)  # the umask decides its permissions
    try:
        yield temporary
        if keep_first:
            with suppress(OSError):  # it exists, or the file system has no hard links
                os.link(temporary, path)
        if not keep_first or not path.exists():
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        if is_new and not any(path.parent.iterdir()):
            path.parent.rmdir()


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Lock a folder among the processes of this node; yields whether this process has the lock.

    The folder is created, and removed again if it stays empty. The lock ends with the process, kill
    -9 included. A lock on a folder is local to the node, also on a network file system. Without
    support for locks, or if the folder cannot be made, every process has the lock.
    """
    is_new, handle, has_lock = not folder.exists(), None, True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        has_lock = False
    except OSError:
        pass  # the lock only saves work; writing into the folder will report what is wrong with it
    try:
        yield has_lock
    finally:
        if handle is not None:
            os.close(handle)
        if is_new:
            with suppress(OSError):  # not empty, or removed by another process
                folder.rmdir()
