"""The quick lane: the tests that start no process, but for a few files that take long."""

from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

TESTS = f"{Path(__file__).parent}/"
LIBRARIES = ("subprocess", "multiprocessing", "torch.multiprocessing", "torch.multiprocessing.spawn")
HELPERS = ("forked", "training_runs", "saver_run", "kills")  # files of tests/ that start processes
STARTERS = (*LIBRARIES, *HELPERS)
SLOW = (  # 8 to 70 s of processor time each, as measured
    "data/test_dataloader.py",
    "inference/test_generate_command.py",
    "model/test_step.py",
    "rehearse/test_rehearse.py",
)


def is_quick(item: pytest.Function) -> bool:
    return not str(item.path).endswith(SLOW) and not starts_processes(item)


def starts_processes(item: pytest.Function) -> bool:
    """Whether a test, one of its fixtures or a helper in tests/ that they call starts a process."""
    fixtures = (definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found)
    return any(_starts(thing, set()) for thing in (item.function, *fixtures))


def _starts(thing: Any, seen: set[int]) -> bool:
    if isinstance(thing, ModuleType):
        return thing.__name__ in STARTERS
    if id(thing) in seen:
        return False
    seen.add(id(thing))
    if isinstance(thing, type):
        return thing.__module__ in STARTERS or any(_starts(member, seen) for member in vars(thing).values())
    if not isinstance(thing, FunctionType):
        return False
    if thing.__module__ in STARTERS:
        return True
    if not thing.__code__.co_filename.startswith(TESTS):
        return False
    names = set(_names(thing.__code__))
    imported_inside = not names.isdisjoint(STARTERS)
    return imported_inside or any(_starts(thing.__globals__[name], seen) for name in names & thing.__globals__.keys())


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function, and those defined inside it, look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
