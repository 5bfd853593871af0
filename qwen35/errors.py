"""Mistakes that are the user's to mend: told in one line on standard error, without a traceback."""

import argparse
import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """What a user can mend. The message is one line: it names the file, record, field or setting, and says what to do."""


class SettingError(UserError):
    """A setting that is unknown, misspelt, of the wrong type or in contradiction with another."""


USER_ERRORS = (UserError, OSError)
LARGEST_TEXT = (
    64 * 2**20
)  # bytes; the index of a model of 2,400 billion parameters, an entry for each expert, has 20 MB


def printable(text: str) -> str:
    """With escapes for what a terminal would obey and not show: control characters, line ends, marks of direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return printable(f"{named}{error.strerror}")
    return printable(" ".join(str(error).split())) or type(error).__name__


def complain(error: BaseException, prefix: str = "error: ") -> int:
    """Tell what went wrong. Returns the exit code."""
    print(f"{prefix}{one_line(error)}", file=sys.stderr, flush=True)
    return 1


class Parser(argparse.ArgumentParser):
    """A wrong command line is one line too; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help shows what there is\n")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """For argparse: a whole number from low to high."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {low}" + (f" to {high}" if high else "")
            )
        return int(text)

    return parse


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError inside names the file: those of writing, a full disk's, do not by themselves."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def read_text(path: Path, kind: type[UserError], absent: str = "no such file") -> str:
    """A text file. Raises `kind`; `absent` is what to say of a file that is not there.

    A pipe or a device might never end, and a file of more than LARGEST_TEXT bytes holds something else.
    """
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST_TEXT:
            return path.read_text(encoding="utf-8")
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        what = (
            f"{found.st_size:,} bytes, more than {LARGEST_TEXT:,}"
            if found.st_size
            else "a pipe or a device, not a file"
        )
        raise kind(f"{path}: cannot be read: {what}")
    except FileNotFoundError:
        raise kind(f"{path}: {absent}") from None
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_object(path: Path, kind: type[UserError], absent: str = "no such file") -> dict[str, Any]:
    """A file that holds a JSON object. Raises as `read_text`, and `kind` for what is none."""
    text = read_text(path, kind, absent)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise kind(f"{path}: not a JSON object")
    return value
