"""Arrow tables: the rows of parquet files, and JSON that was written from a table.

All objects in a column of a table have the same fields: of two tools, each gets the parameters of
the other, and each call the arguments of the other, all null. Left in, these nulls would teach the
model to write them, so they are dropped.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen35.data.record import RecordError
from qwen35.errors import SettingError, one_line

PARQUET = b"PAR1"  # the first bytes of a file
ROWS = 1024  # in memory at once
UNREAD = "(a column that is not read)"
UNDECIDED = 1000  # after so many records without any null, others are read only where the text has one
DEEPEST = 100  # nested lists and objects; no table is deeper


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
    """Raises RecordError for what Python cannot hold: nanosecond times, bad UTF-8, far dates.

    And for maps, of which Arrow gives lists of pairs, so that an empty one is not told from a list.
    """
    if "map<" in str(column.type):
        raise RecordError(
            f"{where}: holds maps, whose objects are read as pairs; write them as structs, or as JSON text"
        )
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError) as error:
        raise RecordError(f"{where}: cannot be read: {one_line(error)}") from None
    return values


def is_from_table(records: Iterable[Any], undecided: int | None = UNDECIDED) -> bool | None:
    """Whether the nulls in the JSON records of a file were filled in by a table.

    None: the first `undecided` records have no null, so whether it is one was not looked at.

    They were if all objects at the same path (`messages[].role` is one path for all turns) have the
    same keys and value types, which objects written by hand do not, and if the nulls give it away:
    a key is null in one object and not in another, or a property in a tool's parameters is null,
    which is no schema. Otherwise the nulls are intended, and stay.
    """
    keys: dict[tuple[str, ...], set[str]] = {}  # of the objects at a path
    given: dict[tuple[str, ...], type] = {}  # type of the values at a path that are not null
    nulls: set[tuple[str, ...]] = set()
    has_null_property = False
    for number, record in enumerate(records):
        if number == undecided and not nulls:
            return None
        rest: list[tuple[tuple[str, ...], Any]] = [((), record)]
        while rest:
            path, value = rest.pop()
            if len(path) > DEEPEST:
                return False
            if isinstance(value, list):
                rest += [((*path, "[]"), part) for part in value if isinstance(part, dict | list)]
                continue
            found = set(value) if isinstance(value, dict) else set()
            if keys.setdefault(path, found) != found:
                return False
            for key in found:
                part, inner = value[key], (*path, f".{key}")
                if part is None:
                    nulls.add(inner)
                    has_null_property |= path[-1:] == (".properties",)
                elif given.setdefault(inner, kind := _kind(part)) is not kind:
                    return False
                if isinstance(part, dict | list):
                    rest.append((inner, part))
    return has_null_property or not nulls.isdisjoint(given)


def _kind(value: Any) -> type:
    """The type of a value; integers count as floats, since a column may hold both."""
    return float if type(value) is int else type(value)


def without_nulls(value: Any) -> Any:
    """A table row, or JSON written from one, without null fields; nulls in lists stay."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
