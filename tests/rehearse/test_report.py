"""The report of a rehearsal."""

from collections import Counter
from types import SimpleNamespace

from rehearse.report import STEP, _operators, bytes_by_operator


def test_launches_of_triton_kernels_are_those_of_the_step() -> None:
    """Not those of set-up."""
    ops = Counter({"delta_rule::scan": 3, "causal_conv1d::forward": 3, "rms_norm_gated::backward": 1, "aten::mm": 9})
    record = SimpleNamespace(ops=ops, launched=16, syncs=0)
    phases = ["set-up", *STEP]
    operators = SimpleNamespace(by_phase=dict.fromkeys(phases, record))
    *_, line = _operators(SimpleNamespace(operators=operators))
    assert line.startswith(f"Triton kernels: {7 * len(STEP)} launches a step") and "post2" in line
    record.ops = Counter({"aten::mm": 9})
    assert not any("Triton" in line for line in _operators(SimpleNamespace(operators=operators)))


def test_bytes_by_operator_and_line() -> None:
    """The most first; a line of little has no row of its own, but counts with its operator."""
    add, mul, little = ("aten::add", "a.py:1"), ("aten::mul", "a.py:2"), ("aten::mul", "b.py:3")
    records = [Counter({add: 10**9, little: 10**6}), Counter({add: 2 * 10**9, mul: 6 * 10**9}), Counter()]
    phases = {phase: SimpleNamespace(moved=moved) for phase, moved in zip(STEP, records, strict=True)}
    found = list(bytes_by_operator(SimpleNamespace(operators=SimpleNamespace(by_phase=phases))))
    assert [line.split()[-4:] for line in found[1:]] == [
        ["1.0", "8.0", "0.0", "9.0"],
        *([["0.0", "6.0", "0.0", "6.0"]] * 2),  # the operator, its line
        *([["1.0", "2.0", "0.0", "3.0"]] * 2),
    ]
    assert [line.split()[0] for line in found] == ["GB", "all", "aten::mul", "a.py:2", "aten::add", "a.py:1"]
