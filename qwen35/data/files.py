"""The JSON files of a model folder, and files written whole or not at all."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen35.errors import SettingError, read_object, read_text

PROCESSOR = "processor_config.json"
SIZES = ("size", "min_pixels", "max_pixels", "fps", "max_frames", "num_frames", "max_video_tokens")


def read_config(folder: str | Path, name: str) -> dict[str, Any]:
    """`name` of a model folder. Raises SettingError if it is not there or no JSON object."""
    absent = "no such file; model_name_or_path names a whole Hugging Face folder"
    return read_object(Path(folder) / name, SettingError, absent)


def read_processor(folder: str | Path, section: str, *names: str) -> tuple[dict[str, Any], str]:
    """A processor's config, and where it stands: the first that is there, in transformers' order. Raises SettingError.

    It is a section of processor_config.json, which transformers 5 saves, or a file of its own.
    """
    path = Path(folder) / PROCESSOR
    if path.is_file() and (found := read_object(path, SettingError).get(section)) is not None:
        if not isinstance(found, dict):
            raise SettingError(f"{path}: {section}: {str(found)[:80]} is not an object")
        return found, f"{path}: {section}"
    name = next((name for name in names if (Path(folder) / name).is_file()), names[-1])
    return read_config(folder, name), f"{folder}/{name}"


def ignored_sizes(folder: str | Path, least: int, most: int, section: str, *names: str) -> str | None:
    """What a processor's config says of sizes and frames, which the recipe says instead: pixels from `least` to `most`.

    None if it says the same. min_pixels and max_pixels stand for what `size` says. Raises SettingError.
    """
    config, where = read_processor(folder, section, *names)
    said = {key: config[key] for key in SIZES if config.get(key) is not None}
    size = said.get("size")
    size = dict(size) if isinstance(size, dict) else {}
    size |= {
        edge: said[key]
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
        if key in said
    }
    if not said or ({"shortest_edge": least, "longest_edge": most} == size and not said.keys() - {"size", *SIZES[1:3]}):
        return None
    return f"{where}: not read: {', '.join(f'{key} {value}'[:80] for key, value in said.items())}"


def read_chat_template(folder: str | Path) -> tuple[str, str] | None:
    """A model folder's chat template, and the file that holds it; None if it has none. Raises SettingError.

    Tokenizers take chat_template.jinja before what tokenizer_config.json holds, processors take chat_template.json before
    both, and servers ask either: so the two must not differ. Of several named templates the one that is used would depend on
    the conversation.
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
    """A new file beside `path`, which takes its place when the block ends well and is removed when it does not.

    Several processes may write the same at once, on several machines too: the last one stands, or the first. With the first
    nobody loses the file that he has open: a network's file system keeps none whose name was given to another one there.
    Raises OSError, also where `path` is there and is no plain file (a folder, /dev/null).
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "is there already, and is no plain file", str(path))
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    temporary.touch(exist_ok=False)  # with the permissions that the umask leaves
    try:
        yield temporary
        if not keep_first or not _has_name(temporary, path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        if is_new and not any(path.parent.iterdir()):
            path.parent.rmdir()


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Whether no other process of this machine is in such a block with this folder (made if need be), for as long as it lasts.

    The lock ends with the process, kill -9 included. On a folder it is one of this machine, on a network's file system too.
    Where there are no locks, or the folder cannot be made, everybody is alone. One that was made here and is empty goes again.
    """
    is_new, handle, has_lock = not folder.exists(), None, True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        has_lock = False
    except OSError:
        pass  # the lock only spares work; who writes into the folder finds out what is wrong with it
    try:
        yield has_lock
    finally:
        if handle is not None:
            os.close(handle)
        if is_new:
            with suppress(OSError):  # it holds something, or another has removed it
                folder.rmdir()


def _has_name(file: Path, path: Path) -> bool:
    """Give a file one more name, unless another file has it; False where the file system knows one name a file."""
    try:
        os.link(file, path)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True
