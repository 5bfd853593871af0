"""JSON of which nothing is lost: a key that stands twice, NaN, and numbers too large for a float are mistakes."""

import json
import math
from typing import Any


class LossyJSONError(ValueError):
    """What Python's decoder would have dropped or changed without a word."""


class StrictDecoder:
    """Decodes as Python does; in the place of a value that lost something on the way comes a LossyJSONError.

    It is returned and not raised, so that whoever reads one value after the other can go on behind it.
    """

    def __init__(self) -> None:
        self._loss: str | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_float=self._float, parse_constant=self._constant
        )

    def decode(self, text: str) -> Any:
        """The one value of a text. Raises ValueError, RecursionError where it is not JSON."""
        self._loss = None
        value = self._decoder.decode(text)
        return value if self._loss is None else LossyJSONError(self._loss)

    def decode_at(self, text: str, position: int) -> tuple[Any, int]:
        """A value that begins there, and where it ends. Raises as `decode`."""
        self._loss = None
        value, end = self._decoder.raw_decode(text, position)
        return (value if self._loss is None else LossyJSONError(self._loss)), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self._loss = self._loss or f"the key {twice[:80]!r} stands twice in one object; keep one of them"
        return found

    def _float(self, text: str) -> float:
        number = float(text)
        if math.isinf(number):
            self._loss = self._loss or f"the number {text[:40]} is too large to be represented; write it as text"
        return number

    def _constant(self, text: str) -> None:
        self._loss = self._loss or f"{text} is no number in JSON; write null or leave the key out"


def loads(text: str) -> Any:
    """As json.loads, strictly. Raises ValueError, RecursionError."""
    value = StrictDecoder().decode(text)
    if isinstance(value, LossyJSONError):
        raise value
    return value
