"""The rows of a parquet file as objects, without the fields that are null: a column's objects all have the fields of any."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen35.data.arrow_json import without_nulls
from qwen35.data.record import RecordError
from qwen35.errors import SettingError, one_line

PARQUET = b"PAR1"  # how a file begins
ROWS = 1024  # that are in memory at once
UNREAD = "(a column that is not read)"


def read_parquet(file: Path, is_asked_for: Callable[[str], bool] | None) -> Iterator[dict[str, Any]]:
    """is_asked_for: whether a column's values are, None: all are. Others have UNREAD for a value, and may hold anything.

    Raises RecordError, SettingError where pyarrow is missing.
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
                raise RecordError(f"{file}: has several columns of the name {twice[0]!r}; keep one of them")
            read = [name for name in names if is_asked_for is None or is_asked_for(name)]
            unread = {name: UNREAD for name in names if name not in read}
            for batch in table.iter_batches(batch_size=ROWS, columns=read):
                values = [_values(batch.column(name), f"{file}, column {name!r}") for name in read]
                for row in zip(*values, strict=True) if read else [()] * batch.num_rows:
                    yield without_nulls(dict(zip(read, row, strict=True))) | unread
    except (ArrowException, OSError) as error:
        raise RecordError(f"{file}: parquet that cannot be read: {one_line(error)}") from None


def _values(column: Any, where: str) -> list[Any]:
    """Raises RecordError for what Python cannot say: times of nanoseconds, text that is not UTF-8, dates far away."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError) as error:
        raise RecordError(f"{where}: cannot be read: {one_line(error)}") from None
    return values
