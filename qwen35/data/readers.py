"""Reads the values of a record file: a JSON list, JSON lines or parquet, by its first bytes."""

import codecs
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from qwen35.data import json_list
from qwen35.data.arrow_json import is_from_table, without_nulls
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.diagnosis import wrong_format
from qwen35.data.json_list import LONGEST_VALUE, too_long
from qwen35.data.parquet import PARQUET, read_parquet
from qwen35.data.record import RecordError
from qwen35.data.strict_json import LossyJSONError, StrictDecoder
from qwen35.errors import one_line

FORMATS = "; expected a JSON list, one JSON object per line, or parquet"


def read_values(
    file: Path,
    lenient: bool = False,
    needs_column: Callable[[str], bool] | None = None,
    warnings: DataWarnings | None = None,
) -> Iterator[Any]:
    """The values, while only a part of the file is in memory.

    Null fields are dropped from parquet, and from JSON that was written from a table
    (arrow_json.py); the latter is counted in `warnings`. needs_column: as for `read_parquet`.
    lenient: a record that is not JSON, or would lose data, is yielded as a RecordError, unless all
    are. Raises RecordError, and SettingError if pyarrow is needed and missing.
    """
    with file.open("rb") as stream:
        start = stream.read(len(PARQUET))
    if start == PARQUET:
        yield from read_parquet(file, needs_column)
    elif reason := wrong_format(file):
        raise RecordError(f"{file}: {reason}")
    elif _is_from_table(file):
        for number, value in enumerate(_read_json(file, lenient), 1):
            stripped = value if isinstance(value, RecordError) else without_nulls(value)
            if warnings is not None and stripped != value:
                warnings.count("nulls", 1, f"{file}, record {number}")
            yield stripped
    else:
        yield from _read_json(file, lenient)


def _is_from_table(file: Path) -> bool:
    """Reads only as far as needed; what cannot be read is reported when the values are read."""
    with closing(_read_json(file, lenient=True)) as values:
        try:
            return is_from_table(value for value in values if not isinstance(value, RecordError))
        except RecordError:
            return False


def _read_json(file: Path, lenient: bool) -> Generator[Any, None, None]:
    errors: list[RecordError] = []
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            start = " "
            while start.isspace():
                start = stream.read(1)
            stream.seek(0)
            for value in json_list.values(stream) if start == "[" else _lines(stream):
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
    except UnicodeDecodeError as error:
        raise RecordError(f"{file}: not UTF-8 text: {error.reason} at byte {_first_wrong_byte(file)}") from None
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, endlessly nested lists
        raise RecordError(f"{file}: JSON that cannot be read: record {number + 1}: {one_line(error)}") from None
    if start == "":
        raise RecordError(f"{file}: is empty")
    if errors and len(errors) == number:
        raise errors[0]


def _first_wrong_byte(file: Path) -> int:
    """The offset in a file that is not UTF-8; UnicodeDecodeError counts from its block's start."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with file.open("rb") as stream:
        while True:
            block, pending = stream.read(1 << 20), len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return read - pending + error.start
            if not block:
                return read
            read += len(block)


def _lines(stream: TextIO) -> Iterator[Any]:
    """The value of each line, or the ValueError that it raised."""
    decode = StrictDecoder().decode
    while line := stream.readline(LONGEST_VALUE + 1):
        if len(line) > LONGEST_VALUE:
            while line and not line.endswith("\n"):
                line = stream.readline(LONGEST_VALUE)
            yield ValueError(too_long())
        elif line.strip():
            try:
                yield decode(line)
            except ValueError as error:
                yield error
            except RecursionError as error:
                yield ValueError(one_line(error))


def _record_error(error: ValueError, source: str, is_first: bool) -> RecordError:
    """An error in the first record, or several values in a line, suggest another format."""
    if isinstance(error, json.JSONDecodeError):
        hint = FORMATS if is_first or error.msg == "Extra data" else ""
        return RecordError(f"{source}: not JSON: {error.msg} at column {error.colno} of its line{hint}", "not JSON")
    if isinstance(error, LossyJSONError):
        return RecordError(f"{source}: {error}")
    return RecordError(f"{source}: JSON that cannot be read: {one_line(error)}", "not JSON")
