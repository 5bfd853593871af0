"""Reads a pickle as plain data: nothing that it names is imported, called or changed.

Python's unpickler runs the file as a program. Even if it may name only a few classes, a file can
set their attributes, have deeply nested values hashed, or any amount of memory allocated. Here
pickletools takes it apart, a class is only its name, an object a Pickled, and only opcodes that
occur in torch's files are supported.
"""

import pickle
import pickletools
from dataclasses import dataclass
from typing import Any

MAX_PICKLE_BYTES = 64 * 2**20  # enough to describe some 300,000 chunks


class Name(str):
    """A class or function, as `module.name`."""


PERSISTENT = Name("persistent")  # stands for a reference to something outside the pickle


class Pairs(list[tuple[Any, Any]]):
    """The items of a dict, whose keys are never hashed."""


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


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
        return _run(data)
    except (IndexError, KeyError, ValueError):
        raise pickle.UnpicklingError("it is cut off or damaged") from None


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        begin = marks.pop()
        values = stack[begin:]
        del stack[begin:]
        return values

    value: Any
    for opcode, value, _ in pickletools.genops(data):
        match opcode.name:
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(CONSTANTS[opcode.name])
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if opcode.name == "EMPTY_LIST" else Pairs())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if opcode.name == "APPEND" else since_mark()
                _checked(list, stack[-1]).extend(values)
            case "SETITEM" | "SETITEMS":
                values = [stack.pop(-2), stack.pop()] if opcode.name == "SETITEM" else since_mark()
                _checked(Pairs, stack[-1]).extend(zip(values[::2], values[1::2], strict=True))
            case "GLOBAL":
                stack.append(Name(value.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = _checked(str, stack.pop()), _checked(str, stack.pop())
                stack.append(Name(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                args, made = _checked(tuple, stack.pop()), _checked(Name, stack.pop())
                stack.append(Pickled(made, args))
            case "BINPERSID":
                stack.append(Pickled(PERSISTENT, (stack.pop(),)))
            case "BUILD":
                state = stack.pop()
                _checked(Pickled, stack[-1]).state = state
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case _:
                raise pickle.UnpicklingError(f"the instruction {opcode.name} has no place in it")
    raise AssertionError("genops raises ValueError where a pickle has no end")


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
