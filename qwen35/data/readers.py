"""Reads the values of a record file: a JSON list, JSON lines or parquet, by its first bytes.

JSON is decoded strictly: duplicate keys, NaN and numbers too large for a float are errors.
"""

import json
import math
import mmap
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from qwen35.data.arrow import PARQUET, UNDECIDED, is_from_table, read_parquet, without_nulls
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.media import wrong_format
from qwen35.data.record import RecordError
from qwen35.errors import distinct, one_line

FORMATS = "; expected a JSON list, one JSON object per line, or parquet"
LARGEST_LIST = 2 << 30  # bytes of a JSON list, whose text is in memory; of JSON lines one line is
LONGEST_VALUE = 64 << 20  # bytes; more than any record needs, even with embedded images
TOO_LONG = "has more than {:,} bytes; keep images in files, and split long texts"
TO_LINES = "python3 -c 'import json,sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]'"
SPACE = re.compile(r"[ \t\n\r]*")


class LossyJSONError(ValueError):
    """Python's decoder would have dropped or changed a value without an error."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return distinct(pairs)
    except ValueError as error:
        raise LossyJSONError(error) from None


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise LossyJSONError(f"the number {text[:40]} is too large to be represented; write it as text")
    return number


def _constant(text: str) -> None:
    raise LossyJSONError(f"{text} is not a number in JSON; write null or leave the key out")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
ANY = json.JSONDecoder()


def read_values(
    file: Path,
    lenient: bool = False,
    needs_column: Callable[[str], bool] | None = None,
    warnings: DataWarnings | None = None,
) -> Iterator[Any]:
    """The values, one by one.

    Null fields are dropped from parquet, and from JSON that was written from a table (arrow.py);
    the latter is counted in `warnings`. needs_column: as for `read_parquet`. lenient: a record that
    is not JSON, or would lose data, is yielded as a RecordError, unless all are. Raises
    RecordError, and SettingError if pyarrow is needed and missing.
    """
    with file.open("rb") as stream:
        start = stream.read(len(PARQUET))
    if start == PARQUET:
        yield from read_parquet(file, needs_column)
    elif reason := wrong_format(file):
        raise RecordError(f"{file}: {reason}")
    else:
        values = _json_values(file)
        is_table = _is_from_table(values, file)
        for number, value in enumerate(_checked(values(), file, lenient), 1):
            stripped = without_nulls(value) if is_table else value
            if warnings is not None and is_table and stripped != value:
                warnings.count("nulls", 1, f"{file}, record {number}")
            yield stripped


def _is_from_table(values: Callable[[], Iterator[Any]], file: Path) -> bool:
    """Reads only as far as needed; what cannot be read is reported when the values are read."""

    def first(undecided: int | None) -> bool | None:
        with closing(_checked(values(), file, lenient=True)) as checked:
            try:
                return is_from_table((v for v in checked if not isinstance(v, RecordError)), undecided)
            except RecordError:
                return False

    found = first(UNDECIDED)
    if found is None:  # most files have no null at all, which their bytes show sooner than their values
        found = _has_null(file) and first(None)
    return bool(found)


def _has_null(file: Path) -> bool:
    """Whether the file has `: null`, which may also stand in a text that holds JSON."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(b"null")
        while at >= 0:
            if data[max(0, at - 64) : at].rstrip().endswith(b":"):
                return True
            at = data.find(b"null", at + 4)
    return False


def _json_values(file: Path) -> Callable[[], Iterator[Any]]:
    """Gives the values, or the ValueError for one; each call begins anew. Raises RecordError."""
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        while (start := stream.read(1)).isspace():
            pass
    if not start:
        raise RecordError(f"{file}: is empty")
    if start != "[":
        return partial(_lines, file)
    if (size := file.stat().st_size) > LARGEST_LIST:
        raise RecordError(
            f"{file}: is a JSON list of {size:,} bytes, more than {LARGEST_LIST:,}, and lists are read whole; make it JSON "
            f"lines, which are read one by one: {TO_LINES} < {quote(file.name)} > {quote(file.stem)}.jsonl"
        )
    return partial(list_values, _text(file.read_bytes(), file))


def _text(data: bytes, file: Path, begin: int = 0) -> str:
    """The text of the bytes from `begin` on. Raises RecordError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(f"{file}: not UTF-8 text: {error.reason} at byte {begin + error.start}") from None


def _checked(values: Iterator[Any], file: Path, lenient: bool) -> Generator[Any, None, None]:
    """The values, with errors as RecordErrors that name the file and the record."""
    errors: list[RecordError] = []
    number = 0
    try:
        for value in values:
            number += 1
            if isinstance(value, ValueError):
                value = _record_error(value, f"{file}, record {number}", is_first=number == 1)
                errors.append(value)
                if not lenient:
                    raise value
            yield value
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno}, after {number:,} records"
        raise RecordError(f"{file}: not JSON: {error.msg} {where}") from None
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, endlessly nested lists
        raise RecordError(f"{file}: JSON that cannot be read: record {number + 1}: {one_line(error)}") from None
    if errors and len(errors) == number:
        raise errors[0]


def list_values(text: str) -> Iterator[Any]:
    """The values of the JSON list in `text`, or the ValueError for one that loses data or is long.

    Raises what json.loads would raise, after the values before the error.
    """
    at = _skip(text, _skip(text, 0) + 1)
    if not text.startswith("]", at):
        while True:
            try:
                value, end = STRICT.raw_decode(text, at)
            except LossyJSONError as error:
                value, end = error, ANY.raw_decode(text, at)[1]
            yield value if end - at <= LONGEST_VALUE else ValueError(TOO_LONG.format(LONGEST_VALUE))
            at = _skip(text, end)
            if text.startswith("]", at):
                break
            if not text.startswith(",", at):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _skip(text, at + 1)
    if (at := _skip(text, at + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _skip(text: str, at: int) -> int:
    """The place of the first character from `at` on that is not white space."""
    match = SPACE.match(text, at)
    return match.end() if match else at


def _lines(file: Path) -> Iterator[Any]:
    """The value of each line, or the ValueError that it raised. Raises RecordError."""
    begin = 0
    with file.open("rb") as stream:
        while line := stream.readline(LONGEST_VALUE + 1):
            if len(line) > LONGEST_VALUE:
                while line and not line.endswith(b"\n"):
                    begin += len(line)
                    line = stream.readline(LONGEST_VALUE)
                yield ValueError(TOO_LONG.format(LONGEST_VALUE))
            else:
                text = _text(line, file, begin)
                try:
                    if text.strip():
                        yield STRICT.decode(text)
                except ValueError as error:
                    yield error
                except RecursionError as error:
                    yield ValueError(one_line(error))
            begin += len(line)


def _record_error(error: ValueError, source: str, is_first: bool) -> RecordError:
    """An error in the first record, or several values in a line, suggest another format."""
    if isinstance(error, json.JSONDecodeError):
        hint = FORMATS if is_first or error.msg == "Extra data" else ""
        return RecordError(f"{source}: not JSON: {error.msg} at column {error.colno} of its line{hint}", "not JSON")
    if isinstance(error, LossyJSONError):
        return RecordError(f"{source}: {error}")
    return RecordError(f"{source}: JSON that cannot be read: {one_line(error)}", "not JSON")
