"""Reads the rows of a parquet file as objects without null fields (see arrow_json.py)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen35.data.arrow_json import without_nulls
from qwen35.data.record import RecordError
from qwen35.errors import SettingError, one_line

PARQUET = b"PAR1"  # the first bytes of a file
ROWS = 1024  # in memory at once
UNREAD = "(a column that is not read)"


def read_parquet(file: Path, needs_column: Callable[[str], bool] | None) -> Iterator[dict[str, Any]]:
    """The rows of a file, one by one.

    needs_column: whether a column's values are needed; None: all are. Other columns are not read,
    whatever they hold, and have the value UNREAD. Raises RecordError, and SettingError if pyarrow
    is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise SettingError(
            f"{file}: is a parquet file, and pyarrow is missing; install it (.venv/bin/pip install pyarrow)"
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise RecordError(f"{file}: has several columns named {twice[0]!r}; keep one of them")
            read = [name for name in names if needs_column is None or needs_column(name)]
            unread = {name: UNREAD for name in names if name not in read}
            for batch in table.iter_batches(batch_size=ROWS, columns=read):
                values = [_values(batch.column(name), f"{file}, column {name!r}") for name in read]
                for row in zip(*values, strict=True) if read else [()] * batch.num_rows:
                    yield without_nulls(dict(zip(read, row, strict=True))) | unread
    except (ArrowException, OSError) as error:
        raise RecordError(f"{file}: parquet that cannot be read: {one_line(error)}") from None


def _values(column: Any, where: str) -> list[Any]:
    """Raises RecordError for what Python cannot hold: nanosecond times, bad UTF-8, far dates."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError) as error:
        raise RecordError(f"{where}: cannot be read: {one_line(error)}") from None
    return values
