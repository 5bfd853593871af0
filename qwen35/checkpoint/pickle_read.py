"""Reads a pickle as plain data: nothing that it names is imported, called or changed.

Python's unpickler runs the file as a program. Even if it may name only a few classes, a hostile
file can set their attributes, make it hash deeply nested values, or make it allocate any amount of
memory. Here a reference to a class is only its name, and an object is a Pickled. Only the opcodes
that occur in torch's files are supported.
"""

import pickle
import struct
from dataclasses import dataclass
from typing import Any

MAX_PICKLE_BYTES = 64 * 2**20  # enough to describe some 300,000 chunks
CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
INTEGERS = {ord("K"): struct.Struct("<B"), ord("M"): struct.Struct("<H"), ord("J"): struct.Struct("<i")}
SIZES = {1: struct.Struct("<B"), 4: struct.Struct("<I")}  # width in bytes -> format of a length or memo index
STRINGS, GETS, PUTS = {0x8C: 1, ord("X"): 4}, {ord("h"): 1, ord("j"): 4}, {ord("q"): 1, ord("r"): 4}
TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
SKIPPED = {0x80: 1, 0x95: 8}  # protocol number; frame length


class Name(str):
    """A class or function, as `module.name`."""


PERSISTENT = Name("persistent")  # stands for a reference to something outside the pickle


class Pairs(list[tuple[Any, Any]]):
    """The items of a dict, whose keys are never hashed."""


EMPTY = {ord(")"): tuple, ord("]"): list, ord("}"): Pairs}


@dataclass(slots=True, eq=False)
class Pickled:
    """The object that `name(*args)` would make, and the state that it would be given."""

    name: Name
    args: tuple[Any, ...]
    state: Any = None


def read_pickle(data: bytes) -> Any:
    """The value: None, bool, int, str, Name, tuple, list, Pairs or Pickled, nested in any way.

    Raises pickle.UnpicklingError for anything else, and for damaged data.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError(f"it is larger than {MAX_PICKLE_BYTES:,} bytes")
    try:
        return _Reader(data).run()
    except (IndexError, KeyError, ValueError, struct.error):
        raise pickle.UnpicklingError("it is cut off or damaged") from None


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.position = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        self.position += count
        if self.position > len(self.data):
            raise IndexError
        return self.data[self.position - count : self.position]

    def size(self, width: int) -> int:
        return SIZES[width].unpack(self.take(width))[0]

    def line(self) -> str:
        return self.take(self.data.index(b"\n", self.position) + 1 - self.position)[:-1].decode()

    def pop(self, kind: type) -> Any:
        return _checked(kind, self.stack.pop())

    def since_mark(self) -> list[Any]:
        begin = self.marks.pop()
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def run(self) -> Any:
        stack, memo = self.stack, self.memo
        while True:
            code = self.take(1)[0]
            if code == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif code in GETS:
                stack.append(memo[self.size(GETS[code])])
            elif code in PUTS:
                memo[self.size(PUTS[code])] = stack[-1]
            elif code in INTEGERS:
                stack.append(INTEGERS[code].unpack(self.take(INTEGERS[code].size))[0])
            elif code == 0x8A:  # LONG1
                stack.append(int.from_bytes(self.take(self.size(1)), "little", signed=True))
            elif code in STRINGS:
                stack.append(self.take(self.size(STRINGS[code])).decode())
            elif code in CONSTANTS:
                stack.append(CONSTANTS[code])
            elif code in EMPTY:
                stack.append(EMPTY[code]())
            elif code in TUPLES:
                stack[-TUPLES[code] :] = [tuple(stack[-TUPLES[code] :])]
            elif code == ord("("):
                self.marks.append(len(stack))
            elif code == ord("t"):
                stack.append(tuple(self.since_mark()))
            elif code in b"ae":  # APPEND, APPENDS
                values = [stack.pop()] if code == ord("a") else self.since_mark()
                _checked(list, stack[-1]).extend(values)
            elif code in b"su":  # SETITEM, SETITEMS
                values = [stack.pop(-2), stack.pop()] if code == ord("s") else self.since_mark()
                _checked(Pairs, stack[-1]).extend(zip(values[::2], values[1::2], strict=True))
            elif code == ord("c"):
                stack.append(Name(f"{self.line()}.{self.line()}"))
            elif code == 0x93:  # STACK_GLOBAL
                name, module = self.pop(str), self.pop(str)
                stack.append(Name(f"{module}.{name}"))
            elif code in b"R\x81":  # REDUCE, NEWOBJ
                args, name = self.pop(tuple), self.pop(Name)
                stack.append(Pickled(name, args))
            elif code == ord("Q"):  # BINPERSID
                stack.append(Pickled(PERSISTENT, (stack.pop(),)))
            elif code == ord("b"):  # BUILD
                state = stack.pop()
                _checked(Pickled, stack[-1]).state = state
            elif code in SKIPPED:
                self.take(SKIPPED[code])
            elif code == ord("."):
                return stack.pop()
            else:
                raise pickle.UnpicklingError(f"the instruction {code:#04x} has no place in it")


def _checked(kind: type, value: Any) -> Any:
    """The value, if it has this type. The error shows no value, which may be nested deeply."""
    if type(value) is not kind:
        what = "dict" if isinstance(value, Pairs) else type(value).__name__
        raise _misplaced(value.name if isinstance(value, Pickled) else value if isinstance(value, Name) else what)
    return value


def _misplaced(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"{ascii(what[:80])[1:-1]} has no place in it")


def called(value: Any, name: str) -> Pickled:
    """The value, if it is an object made by calling `name`."""
    if _checked(Pickled, value).name != name:
        raise _misplaced(value.name)
    return value


def pairs(value: Any) -> Pairs:
    return _checked(Pairs, value)


def fields_of(value: Any, name: str) -> dict[str, Any]:
    """The attributes of a value that must be an object of the class `name`."""
    return {_checked(str, key): item for key, item in pairs(called(value, name).state)}
