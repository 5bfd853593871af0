"""Decodes JSON strictly: duplicate keys, NaN and numbers too large for a float are errors."""

import json
import math
from typing import Any


class LossyJSONError(ValueError):
    """Python's decoder would have dropped or changed a value without an error."""


class StrictDecoder:
    """Decodes like Python's decoder, but gives a LossyJSONError in place of a value that lost data.

    It is returned, not raised, so that a reader of many values can continue after it.
    """

    def __init__(self) -> None:
        self._loss: str | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_float=self._float, parse_constant=self._constant
        )

    def decode(self, text: str) -> Any:
        """The value of a JSON text. Raises ValueError or RecursionError if it is not JSON."""
        self._loss = None
        value = self._decoder.decode(text)
        return value if self._loss is None else LossyJSONError(self._loss)

    def decode_at(self, text: str, position: int) -> tuple[Any, int]:
        """The value that begins at `position`, and its end. Raises like `decode`."""
        self._loss = None
        value, end = self._decoder.raw_decode(text, position)
        return (value if self._loss is None else LossyJSONError(self._loss)), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self._loss = self._loss or f"the key {twice[:80]!r} appears twice in one object; keep one of them"
        return values

    def _float(self, text: str) -> float:
        number = float(text)
        if math.isinf(number):
            self._loss = self._loss or f"the number {text[:40]} is too large to be represented; write it as text"
        return number

    def _constant(self, text: str) -> None:
        self._loss = self._loss or f"{text} is not a number in JSON; write null or leave the key out"


def loads(text: str) -> Any:
    """Like json.loads, but lost data is an error. Raises ValueError, RecursionError."""
    value = StrictDecoder().decode(text)
    if isinstance(value, LossyJSONError):
        raise value
    return value
