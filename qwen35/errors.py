"""Errors that the user can fix: one line on standard error, without a traceback."""

import argparse
import errno
import json
import os
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

LISTS_FOLDER = "QWEN35_LISTS_FOLDER"  # of files that messages name: launchers remove the TMPDIR of their ranks
LONGEST_LINE = 2000  # characters of a message; a longer one loses its middle


def visible(text: str, keep: str = "") -> str:
    """Text from a file or the network, made safe to print: characters become codes such as \\x1b.

    That is, those that a terminal would act on or hide: controls, escapes, line separators,
    bidirectional and zero-width characters; and halves of surrogate pairs, which cannot be printed.
    keep: characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else _code(c) for c in text)


def _code(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shortened(text: str, most: int) -> str:
    """The text, without its middle if it has more than `most` characters."""
    head = most * 2 // 3
    return text if len(text) <= most else f"{text[:head]} … {text[len(text) - (most - head - 3) :]}"


class UserError(ValueError):
    """An error that the user can fix.

    Its message is one line, which names the file, record, field or setting and says what to do.
    """

    def __init__(self, message: str = ""):
        super().__init__(visible(message, keep="\n"))  # a list of errors has a line for each


class SettingError(UserError):
    """A setting that is unknown, misspelt, of the wrong type, or contradicts another."""


USER_ERRORS = (UserError, OSError)
LARGEST_TEXT = 64 << 20  # bytes; a weight index of 2,400 billion parameters, with an entry for each expert, has 20 MB


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if isinstance(error.filename, str) else error.strerror
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return visible(shortened(text, LONGEST_LINE))


def complain(error: BaseException, prefix: str = "error: ") -> int:
    """Print the error. Returns the exit code."""
    print(f"{prefix}{one_line(error)}", file=sys.stderr, flush=True)
    return 1


class Parser(argparse.ArgumentParser):
    """Prints one line for a wrong command line; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from low to high."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            limit = f" to {high}" if high else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low}{limit}")
        return int(text)

    return parse


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the path to an OSError of the block: those of a full disk do not name it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def read_text(path: Path, kind: type[UserError], absent: str = "no such file") -> str:
    """The text of a file. Raises `kind`, with the message `absent` for a missing file.

    Refuses pipes and devices, which might never end, and files of more than LARGEST_TEXT bytes.
    """
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST_TEXT:
            return path.read_text(encoding="utf-8")
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        large = f"{found.st_size:,} bytes, more than {LARGEST_TEXT:,}"
        raise kind(f"{path}: cannot be read: {large if found.st_size else 'a pipe or a device, not a file'}")
    except FileNotFoundError:
        raise kind(f"{path}: {absent}") from None
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key twice, of which Python would take the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} appears twice in one object; keep one of them")
    return values


def read_object(path: Path, kind: type[UserError], absent: str = "no such file") -> dict[str, Any]:
    """The JSON object in a file. Raises like `read_text`, and `kind` for any other content."""
    text = read_text(path, kind, absent)
    try:
        value = json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: {'' if type(error) is ValueError else 'not JSON: '}{one_line(error)}") from None
    if not isinstance(value, dict):
        raise kind(f"{path}: not a JSON object")
    return value
