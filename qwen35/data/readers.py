"""The values of a file of records, one after the other: a JSON list, JSON lines or parquet. Its first bytes say which."""

import codecs
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from qwen35.data import json_list
from qwen35.data.arrow_json import is_from_table, without_nulls
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.diagnosis import recognised
from qwen35.data.json_list import LONGEST_VALUE, too_long
from qwen35.data.parquet import PARQUET, read_parquet
from qwen35.data.record import RecordError
from qwen35.data.strict_json import LossyJSONError, StrictDecoder
from qwen35.errors import one_line

READ = "; what is read: a JSON list, one object a line, or parquet"


def read_values(
    file: Path,
    lenient: bool = False,
    is_asked_for: Callable[[str], bool] | None = None,
    warnings: DataWarnings | None = None,
) -> Iterator[Any]:
    """No more than a part of the file is in memory. Raises RecordError, SettingError where a package is missing.

    Nulls that stand for nothing are left out: all of a parquet file, and of JSON those that it has because it was written
    from a table (arrow_json.py), which `warnings` is told. lenient: a record that is not JSON, or that would lose something,
    becomes a RecordError among the values, unless all are. is_asked_for: as for `read_parquet`.
    """
    with file.open("rb") as stream:
        start = stream.read(len(PARQUET))
    if start == PARQUET:
        yield from read_parquet(file, is_asked_for)
    elif what := recognised(file):
        raise RecordError(f"{file}: {what}")
    elif _is_from_table(file):
        for number, value in enumerate(_json(file, lenient), 1):
            whole = value if isinstance(value, RecordError) else without_nulls(value)
            if warnings is not None and whole != value:
                warnings.count("nulls", 1, f"{file}, record {number}")
            yield whole
    else:
        yield from _json(file, lenient)


def _is_from_table(file: Path) -> bool:
    """Read as far as it takes to know; what cannot be read is told when its turn comes."""
    with closing(_json(file, lenient=True)) as values:
        try:
            return is_from_table(value for value in values if not isinstance(value, RecordError))
        except RecordError:
            return False


def _json(file: Path, lenient: bool) -> Generator[Any, None, None]:
    broken: list[RecordError] = []
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
                    value = _wrong(value, f"{file}, record {number}", is_first=number == 1)
                    broken.append(value)
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
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists within lists without end
        raise RecordError(f"{file}: JSON that cannot be read: record {number + 1}: {one_line(error)}") from None
    if start == "":
        raise RecordError(f"{file}: is empty")
    if broken and len(broken) == number:
        raise broken[0]


def _first_wrong_byte(file: Path) -> int:
    """Of a file that is not UTF-8; what was being read when it showed is only a block of it."""
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
    """The value of each line, or the ValueError that says why it has none."""
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


def _wrong(error: ValueError, source: str, is_first: bool) -> RecordError:
    """What is wrong with a record; with the first, and with several values in one line, perhaps the whole form."""
    if isinstance(error, json.JSONDecodeError):
        form = READ if is_first or error.msg == "Extra data" else ""
        return RecordError(f"{source}: not JSON: {error.msg} at column {error.colno} of its line{form}", "not JSON")
    if isinstance(error, LossyJSONError):
        return RecordError(f"{source}: {error}")
    return RecordError(f"{source}: JSON that cannot be read: {one_line(error)}", "not JSON")
