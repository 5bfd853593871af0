"""The report of a rehearsal."""

from collections import Counter
from types import SimpleNamespace

from rehearse.report import STEP, _operators


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
