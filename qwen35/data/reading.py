"""The values of a file of records, one after the other: a JSON list, JSON lines or parquet. Its first bytes say which."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen35.data import json_list
from qwen35.data.record import RecordError
from qwen35.errors import SettingError, one_line

PARQUET = b"PAR1"
PACKED = (
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\x00",
    b"\x28\xb5\x2f\xfd",
    b"7z\xbc\xaf\x27\x1c",
)  # zip, gzip, bzip2, xz, zstd, 7z
READ = "; what is read: a JSON list, one object a line, or parquet"
ROWS = 1024  # of a parquet file that are in memory at once


def read_values(file: Path, lenient: bool = False) -> Iterator[Any]:
    """No more than a part of the file is in memory. Raises RecordError, SettingError where a package is missing.

    lenient: a line that is not JSON becomes a RecordError among the values, unless no line of the file is.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
    if start.startswith(PACKED):
        raise RecordError(f"{file}: is compressed; unpack it first")
    yield from _parquet(file) if start.startswith(PARQUET) else _json(file, lenient)


def _json(file: Path, lenient: bool) -> Iterator[Any]:
    broken: list[RecordError] = []
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            start = " "
            while start.isspace():
                start = stream.read(1)
            stream.seek(0)
            if start == "[":
                for value in json_list.values(stream):
                    number += 1
                    yield value
                return
            for line in stream:
                if line.strip():
                    number += 1
                    value = _json_line(line, f"{file}, record {number}", is_first=number == 1)
                    if isinstance(value, RecordError):
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
        raise RecordError(f"{file}: JSON that cannot be read: {one_line(error)}") from None
    if start == "":
        raise RecordError(f"{file}: is empty")
    if len(broken) == number:
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


def _json_line(line: str, source: str, is_first: bool) -> Any:
    """Its value, or what is wrong with it; of the first, and of several values in one, perhaps the whole form."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        form = READ if is_first or error.msg == "Extra data" else ""
        return RecordError(f"{source}: not JSON: {error.msg} at column {error.colno} of its line{form}", "not JSON")
    except (ValueError, RecursionError) as error:
        return RecordError(f"{source}: JSON that cannot be read: {one_line(error)}", "not JSON")


def _without_nulls(value: Any) -> Any:
    """Else the call of one tool would have the arguments of the others."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _parquet(file: Path) -> Iterator[Any]:
    """Each row as an object, without the fields that are null: a column's objects all have the fields of any of them."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise SettingError(
            f"{file}: is a parquet file, and pyarrow is missing; install it (.venv/bin/pip install pyarrow)"
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=ROWS):
                yield from map(_without_nulls, batch.to_pylist())
    except (ArrowException, OSError) as error:
        raise RecordError(f"{file}: parquet that cannot be read: {one_line(error)}") from None
