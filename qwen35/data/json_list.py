"""Reads a JSON list of any size value by value, with one value and a block of text in memory."""

import re
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from typing import Any, TextIO

from qwen35.data.strict_json import StrictDecoder

LONGEST_VALUE = 64 << 20  # characters; more than any record needs, even with embedded images
BLOCK = 1 << 20  # characters read at once
SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_WORD = 16  # characters; this close to the end of the window a word, number or escape may be incomplete


def values(stream: TextIO, block: int = BLOCK) -> Iterator[Any]:
    """The values of the list in `stream`; a value that lost data is a LossyJSONError.

    Raises JSONDecodeError with the line and column in the whole file, ValueError for a value longer
    than LONGEST_VALUE, and whatever else the decoder raises (ValueError, RecursionError).
    """
    window = _Window(stream, block)
    window.expect("[")
    if window.at("]"):
        window.skip(1)
    else:
        while True:
            yield window.value()
            if window.at("]"):
                window.skip(1)
                break
            window.expect(",")
    window.end()


def too_long() -> str:
    return f"has more than {LONGEST_VALUE:,} characters; keep images in files, and split long texts"


class _Window:
    """The part of the text that is in memory, and the position in it."""

    def __init__(self, stream: TextIO, block: int):
        self._stream, self._block = stream, block
        self._text, self._position, self._is_whole = "", 0, False
        self._line, self._column = 1, 1  # of the first character of the window, in the file
        self._decode = StrictDecoder().decode_at

    def value(self) -> Any:
        wanted = self._block
        while True:
            self._space()
            try:
                value, end = self._decode(self._text, self._position)
            except JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - LONGEST_WORD
                if self._is_whole or not is_cut:
                    raise self._error(error.msg, error.pos) from None
            else:
                if end < len(self._text) - LONGEST_WORD or self._is_whole:  # otherwise a number might continue
                    self._position = end
                    return value
            if len(self._text) - self._position > LONGEST_VALUE:
                raise ValueError(too_long())
            wanted = self._more(wanted)

    def at(self, character: str) -> bool:
        self._space()
        return self._text.startswith(character, self._position)

    def skip(self, count: int) -> None:
        self._position += count

    def expect(self, character: str) -> None:
        if not self.at(character):
            raise self._error(f"Expecting '{character}' delimiter", self._position)
        self._position += 1

    def end(self) -> None:
        self._space()
        if self._position < len(self._text):
            raise self._error("Extra data", self._position)

    def _space(self) -> None:
        """Skip white space, reading on where the window ends."""
        while True:
            match = SPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text) or self._is_whole:
                return
            self._more(self._block)

    def _more(self, characters: int) -> int:
        """Drop what is parsed and read on. Returns twice `characters`, to read in linear time."""
        done, rest = self._text[: self._position], self._text[self._position :]
        lines = done.count("\n")
        self._column = len(done) - done.rfind("\n") if lines else self._column + len(done)
        self._line += lines
        new = self._stream.read(characters)
        self._text, self._position, self._is_whole = rest + new, 0, not new
        return 2 * characters

    def _error(self, message: str, position: int) -> JSONDecodeError:
        error = JSONDecodeError(message, self._text, position)
        if error.lineno == 1:
            error.colno += self._column - 1
        error.lineno += self._line - 1
        return error
