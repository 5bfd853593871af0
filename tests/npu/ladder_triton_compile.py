"""Rung 5, compilation: what the operators launch, at every published model's shapes, passes
BiShengIR's whole pipeline up to CANN's own step, at the first try, without a remark; A2 and A3 are
the same to it. In a process of its own: here, kernels are interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from table import publish

SCRIPT = Path(__file__).with_name("triton_compile.py")
KERNELS = {
    "causal_conv1d.forward",
    "causal_conv1d.backward",
    "delta_rule_forward.prepare",
    "delta_rule_forward.invert",
    "delta_rule_forward.scan",
    "delta_rule_backward.states",
    "delta_rule_backward.grad_states",
    "delta_rule_gradients.gradients",
    "delta_rule_gradients.finish",
    "norm.forward",
    "norm.backward",
}
TILE = ("C", "BC", "Dk", "Dv", "BV", "D", "ROWS", "HEADS")  # a kernel's constants
WITH_PRODUCTS = {"invert", "scan", "states", "grad_states", "gradients"}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("triton") / "found.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, out], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_every_kernel_compiles_for_every_published_shape(found):
    shapes = {"0.8B, 2B": KERNELS} | dict.fromkeys(
        ("4B, 9B, 35B", "27B", "122B, 397B"), KERNELS - {"norm.forward", "norm.backward"}
    )
    for shape, kernels in shapes.items():
        some = of(found, shape)
        assert set(some) == kernels
        for name, x in some.items():
            assert x["done"] and not x["notes"], (name, shape, x["notes"])


def of(found: list[dict], shape: str, target: str = "Ascend910B2") -> dict[str, dict]:
    return {x["kernel"]: x for x in found if x["shape"] == shape and x["target"] == target}


@pytest.mark.parametrize("target", ["Ascend910B4", "Ascend910_9392"])
def test_other_targets_change_nothing(found, target):
    """Every kernel, at one shape: what is left to CANN alone knows the target."""
    first, other = of(found, "0.8B, 2B"), of(found, "0.8B, 2B", target)
    assert set(other) == KERNELS
    assert other == {name: x | {"target": target} for name, x in first.items()}


def test_the_buffers_of_4b_are_published(found):
    """The norm's kernels are the same for all shapes, and compiled for the first."""
    some = of(found, "0.8B, 2B") | of(found, "4B, 9B, 35B")
    assert set(some) == KERNELS
    lines = ["| kernel | tile | cores | unified buffer | L1 | L0C | workspace |", "|" + " --- |" * 7]
    for name, x in sorted(some.items()):
        tile = " ".join(f"{n}={v}" for n, v in x["constants"].items() if n in TILE)
        cores = "vector" if x["mode"] == "aiv" else "cube + both vector" if x["halves"] else "cube + one vector"
        space = (f"{x['buffers'].get(key, 0):,.0f}" for key in ("ub", "cbuf", "cc", "workspace"))
        lines.append(f"| {name} | {tile} | {cores} | {' | '.join(space)} |")
    publish("2-buffers.md", lines)


def test_other_heads(found):
    """With 256 the last kernel fits into L1 only without double buffering: a remark."""
    for size in (64, 256):
        some = {x["kernel"]: x for x in found if x["shape"] == f"heads of {size}"}
        assert set(some) == KERNELS and all(x["done"] for x in some.values())
        remarked = {name for name, x in some.items() if x["notes"]}
        assert remarked == ({"delta_rule_gradients.gradients"} if size == 256 else set())


def test_smaller_tiles_compile(found):
    for shape in ("chunk 32", "chunk 16"):
        some = {x["kernel"]: x for x in found if x["shape"] == shape}
        assert set(some) == KERNELS and all(x["done"] and not x["notes"] for x in some.values())


def test_in_fp32(found):
    """Two kernels fit only without double buffering."""
    some = {x["kernel"]: x for x in found if x["shape"] == "fp32"}
    assert set(some) == KERNELS and all(x["done"] for x in some.values())
    remarked = {name for name, x in some.items() if x["notes"]}
    assert remarked == {"delta_rule_gradients.gradients", "delta_rule_gradients.finish"}


def test_tiles_lie_in_the_buffers_and_both_vector_cores_share_them(found):
    for x in found:
        if x["shape"] == "too large":
            continue
        products = x["kernel"].partition(".")[2] in WITH_PRODUCTS
        assert x["mode"] == ("mix" if products else "aiv") and x["halves"] == products, x["kernel"]
        assert 0 < x["buffers"]["ub"] <= 192 << 10
        assert (0 < x["buffers"].get("cbuf", 0) <= 512 << 10 and 0 < x["buffers"]["cc"] <= 128 << 10) == products


def test_a_tile_that_does_not_fit_is_detected(found):
    [x] = [x for x in found if x["shape"] == "too large"]
    assert not x["done"] and any("ub overflow, requires" in note for note in x["notes"])
