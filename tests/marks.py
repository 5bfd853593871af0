"""The marks of tests, by what their code names.

`quick` starts no process and is short. `transformers` takes part with that library, or with the hub
that each version of it brings along, so what its other versions do matters: conftest.py keeps it
from all others. `peft` takes part with that library, whose release belongs to one of transformers:
0.21 beside 5.2 takes adapters of MLPs for adapters of routed experts.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

OURS = tuple(f"{Path(__file__).parents[1] / folder}/" for folder in ("tests", "bench"))  # whose code is followed
LIBRARIES = ("subprocess", "multiprocessing", "torch.multiprocessing", "torch.multiprocessing.spawn")
HELPERS = ("forked", "training_runs", "saver_run", "kills")  # files of tests/ that start processes
STARTERS = re.compile("|".join(map(re.escape, (*LIBRARIES, *HELPERS))))
TRANSFORMERS = re.compile(r"(transformers|huggingface_hub)(\..*)?|.*\bimport transformers\b.*", re.DOTALL)
PEFT = re.compile(r"peft(\..*)?")
SLOW = (  # how files of 8 to 70 s of processor time, and tests of 1 to 9 s, begin, as measured
    "data/test_checkpoint_template.py::test_published_templates_give_the_tokens",
    "data/test_checkpoint_template.py::test_the_tokens_before_each_trained_answer",
    "data/test_conversations.py::test_each_answer_is_trained_once",
    "data/test_dataloader.py",
    "data/test_template.py::test_a_sample_has_the_tokens",
    "data/test_template.py::test_random_",
    "data/test_template.py::test_the_trained_tokens_continue",
    "data/test_template.py::test_train_on_prompt_changes_masks",
    "house/test_accept.py::test_check_over_its_time_limit",
    "house/test_accept.py::test_reason_of_a_failed_rank",
    "house/test_accept.py::test_wrong_kernel_is_off",
    "inference/test_generate.py::test_a_long_answer",
    "inference/test_generate_command.py",
    "model/test_step.py",
    "parallel/test_recompute.py::test_bytes_saved_per_layer",
    "rehearse/test_plan.py",
    "rehearse/test_rehearse.py",
)


def marks(item: pytest.Function) -> Iterator[str]:
    name = f"{item.path.parent.name}/{item.path.name}::{item.name}"
    if not name.startswith(SLOW) and not uses(item, STARTERS):
        yield "quick"
    if uses(item, TRANSFORMERS):
        yield "transformers"
    if uses(item, PEFT):
        yield "peft"


def uses(item: pytest.Function, modules: re.Pattern) -> bool:
    """Whether a test, one of its fixtures or a helper that they call names one of these modules."""
    fixtures = (definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found)
    return any(_names_one(thing, modules) for thing in (item.function, *fixtures))


@cache  # a function has many parameters, and a fixture many tests
def _names_one(thing: Any, modules: re.Pattern) -> bool:
    return _uses(thing, modules, set())


def _uses(thing: Any, modules: re.Pattern, seen: set[int]) -> bool:
    if isinstance(thing, ModuleType):
        return bool(modules.fullmatch(thing.__name__))
    thing = getattr(thing, "__wrapped__", thing)  # what functools.cache hides
    if id(thing) in seen:
        return False
    seen.add(id(thing))
    if not isinstance(thing, (type, FunctionType)):
        return False
    if modules.fullmatch(thing.__module__ or ""):
        return True
    if isinstance(thing, type):
        return any(_uses(member, modules, seen) for member in vars(thing).values())
    if not thing.__code__.co_filename.startswith(OURS):
        return False
    names = set(_names(thing.__code__))
    known = [thing.__globals__[name] for name in names & thing.__globals__.keys()]
    for module in known:
        if isinstance(module, ModuleType) and (getattr(module, "__file__", None) or "").startswith(OURS):
            known += [vars(module)[name] for name in names & vars(module).keys()]
    imported_inside = any(map(modules.fullmatch, names))
    return imported_inside or any(_uses(value, modules, seen) for value in known)


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function, and those defined inside it, look up, and programs in its text."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and "import " in constant:
            yield constant
