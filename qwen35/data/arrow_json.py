"""JSON that was written from an Arrow table: each of its objects has the fields of all its like, and null where it had none.

A column of a table gives all of its objects the same fields: of two tools, each gets the parameters of the other, and the call
of one the arguments of the other, all null. Trained as they stand, they would teach a model to write them.
"""

from collections.abc import Iterable
from typing import Any

UNDECIDED = 1000  # records without any null, after which a file is taken for one that has none to leave out
DEEPEST = 100  # lists and objects within each other: no table is deeper


class _Column:
    """What stands at one place of every record: of `messages[].role` there is one, not one for each turn."""

    def __init__(self) -> None:
        self.keys: set[str] | None = None
        self.null: set[str] = set()
        self.given: dict[str, type] = {}  # of each key, what its values are
        self.inner: dict[str, _Column] = {}

    def child(self, key: str) -> "_Column":
        if key not in self.inner:
            self.inner[key] = _Column()
        return self.inner[key]


def is_from_table(records: Iterable[Any]) -> bool:
    """Whether nulls in these records, all those of a file, stand for what is not there.

    So it is where all objects at the same place have the same keys, and values of the same types: tools, calls and turns
    that somebody wrote as they are have not. And the nulls must show it: a key that is null in one object and not in
    another, or a property of a tool's parameters that is null, which is no schema. Else a null is one, and stays.
    """
    root, shown = _Column(), False
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
                    shown = shown or is_properties
                elif column.given.setdefault(key, kind := _kind(part)) is not kind:
                    return False
                if isinstance(part, dict | list):
                    rest.append((column.child(f".{key}"), part, key == "properties", depth + 1))
    return shown or _differs(root)


def _kind(value: Any) -> type:
    """A column has one: a number may be whole in one row and not in the next."""
    return float if type(value) is int else type(value)


def _has_nulls(column: _Column) -> bool:
    return bool(column.null) or any(map(_has_nulls, column.inner.values()))


def _differs(column: _Column) -> bool:
    """Whether any key is null in one object and not in another."""
    return not column.null.isdisjoint(column.given.keys()) or any(map(_differs, column.inner.values()))


def without_nulls(value: Any) -> Any:
    """What a row of a table, or the JSON of one, says; in lists a null is one."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
