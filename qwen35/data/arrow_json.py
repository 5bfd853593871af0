"""Detects JSON that was written from an Arrow table, and drops the nulls that the table filled in.

All objects in a column of a table have the same fields: of two tools, each gets the parameters of
the other, and each call the arguments of the other, all null. Left in, these nulls would teach the
model to write them.
"""

from collections.abc import Iterable
from typing import Any

UNDECIDED = 1000  # after so many records without any null, the file is assumed to have none
DEEPEST = 100  # nested lists and objects; no table is deeper


class _Column:
    """The values at one path in all records: `messages[].role` is one path for all turns."""

    def __init__(self) -> None:
        self.keys: set[str] | None = None  # of its objects
        self.null: set[str] = set()  # keys that are null in some object
        self.given: dict[str, type] = {}  # keys that have a value in some object, and its type
        self.inner: dict[str, _Column] = {}

    def child(self, key: str) -> "_Column":
        if key not in self.inner:
            self.inner[key] = _Column()
        return self.inner[key]


def is_from_table(records: Iterable[Any]) -> bool:
    """Whether the nulls in the records of a file were filled in by a table.

    They were if all objects at the same path have the same keys and value types, which objects
    written by hand do not, and if the nulls give it away: a key is null in one object and not in
    another, or a property in a tool's parameters is null, which is no schema. Otherwise the nulls
    are intended, and stay.
    """
    root, has_null_property = _Column(), False
    for number, record in enumerate(records):
        if number == UNDECIDED and not _has_nulls(root):
            return False
        rest: list[tuple[_Column, Any, bool, int]] = [(root, record, False, 0)]
        while rest:
            column, value, is_properties, depth = rest.pop()
            if depth > DEEPEST:
                return False
            if isinstance(value, list):
                inner = column.child("[]")
                rest += [(inner, part, False, depth + 1) for part in value if isinstance(part, dict | list)]
                continue
            keys = set(value) if isinstance(value, dict) else set()
            if column.keys not in (None, keys):
                return False
            column.keys = keys
            for key in keys:
                part = value[key]
                if part is None:
                    column.null.add(key)
                    has_null_property = has_null_property or is_properties
                elif column.given.setdefault(key, kind := _kind(part)) is not kind:
                    return False
                if isinstance(part, dict | list):
                    rest.append((column.child(f".{key}"), part, key == "properties", depth + 1))
    return has_null_property or _differs(root)


def _kind(value: Any) -> type:
    """The type of a value; integers count as floats, since a column may hold both."""
    return float if type(value) is int else type(value)


def _has_nulls(column: _Column) -> bool:
    return bool(column.null) or any(map(_has_nulls, column.inner.values()))


def _differs(column: _Column) -> bool:
    """Whether any key is null in one object and not in another."""
    return not column.null.isdisjoint(column.given.keys()) or any(map(_differs, column.inner.values()))


def without_nulls(value: Any) -> Any:
    """A table row, or JSON written from one, without null fields; nulls in lists stay."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
