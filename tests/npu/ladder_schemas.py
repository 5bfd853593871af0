"""Every call in kernels/npu.py against the schemas in torch-npu 2.7.1.post2's wheel, NPU_OLD_WHEEL.

The wheel needs Python 3.10 and torch 2.7.1 to import, but its library contains the schemas as text.
"""

import ast
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch

import kernels.npu

WHEEL = Path(os.environ["NPU_OLD_WHEEL"])
SOURCE = Path(kernels.npu.__file__)
CALLS = [
    node
    for node in ast.walk(ast.parse(SOURCE.read_text()))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "npu"
]
WITHOUT_SHAPE = {"npu_gemma_rms_norm"}  # only fake tensors need it, and a rehearsal uses a newer release
NAMES = sorted({call.func.attr for call in CALLS})


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    with zipfile.ZipFile(WHEEL) as wheel:
        return {
            name: wheel.read(f"torch_npu/{name}")
            for name in ("lib/libtorch_npu.so", "op_plugin/meta/_meta_registrations.py")
        }


def schema_in(library: bytes, name: str) -> torch._C.FunctionSchema:
    found = set(re.findall(rb"\0((?:npu::)?" + name.encode() + rb"\([^\0]*-> [^\0]*)\0", library))
    assert len(found) == 1, (name, found)
    return torch._C.parse_schema("npu::" + found.pop().decode().removeprefix("npu::"))


def test_the_calls_are_found():
    assert len(NAMES) >= 14 and all(name.startswith("npu_") for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_older_release_has_the_op_with_these_arguments(name, files):
    old, new = schema_in(files["lib/libtorch_npu.so"], name), getattr(torch.ops.npu, name).default._schema
    by_name = {a.name: a for a in new.arguments}
    for call in (c for c in CALLS if c.func.attr == name):
        positional, keywords = old.arguments[: len(call.args)], [k.arg for k in call.keywords]
        assert len(positional) == len(call.args) and not any(a.kwarg_only for a in positional)
        keyword = [a for a in old.arguments if a.name in keywords]
        assert {a.name for a in keyword} == set(keywords)
        given = [*positional, *keyword]
        missing = {a.name for a in old.arguments if not a.has_default_value()} - {a.name for a in given}
        assert not missing
        # positions, types and defaults of arguments equal those of the newer release
        assert [a.name for a in positional] == [a.name for a in new.arguments[: len(call.args)]]
        for argument in old.arguments:
            assert str(argument.type) == str(by_name[argument.name].type), argument.name
            assert argument.default_value == by_name[argument.name].default_value, argument.name
    assert [str(r.type) for r in old.returns] == [str(r.type) for r in new.returns]


@pytest.mark.parametrize("name", NAMES)
def test_the_older_release_has_its_shape_function(name, files):
    pattern = rb'@impl\(m, "' + name.encode() + rb'(\.default)?"'
    found = re.search(pattern, files["op_plugin/meta/_meta_registrations.py"])
    assert bool(found) == (name not in WITHOUT_SHAPE)
