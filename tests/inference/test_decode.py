"""Decoding token by token against kernels/reference.py over the whole: n tokens, then m steps."""

import pytest
import torch

import kernels
from kernels import reference
from kernels.decode import attention_step, causal_conv1d_step, gated_delta_rule_step, last_inputs
from kernels.gated_delta_rule import chunk_gated_delta_rule_and_state

LENGTHS = [[1], [2], [3], [4], [63], [64], [65], [128], [200], [1, 1, 64, 3, 130, 65], [65, 64, 63]]
STEPS = 5
SIZES = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-12))


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


class Split:
    """The tokens of sequences of n + STEPS tokens: the prompts' packed, then those of each step."""

    def __init__(self, lengths: list[int]):
        self.prompts, self.whole = cu(lengths), cu([n + STEPS for n in lengths])
        starts, ends = self.whole[:-1].tolist(), self.whole[1:].tolist()
        self.of_prompts = torch.cat([torch.arange(a, b - STEPS) for a, b in zip(starts, ends, strict=True)])
        self.of_steps = [torch.tensor([end - STEPS + i for end in ends]) for i in range(STEPS)]
        self.total = ends[-1]

    def compare(self, first: torch.Tensor, steps: list[torch.Tensor], truth: torch.Tensor, tolerance: float) -> None:
        assert error(first, truth[self.of_prompts]) <= tolerance
        for i, (step, rows) in enumerate(zip(steps, self.of_steps, strict=True)):
            assert step.dtype == first.dtype and step.shape == truth[rows].shape
            assert error(step, truth[rows]) <= tolerance, f"step {i}: {error(step, truth[rows]):.1e}"


DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str
)


@SIZES
@DTYPES
@pytest.mark.parametrize("group", [1, 3])
def test_gated_delta_rule(lengths, dtype, tolerance, group):
    split = Split(lengths)
    T, heads = split.total, 2 * group
    inputs = [torch.randn(T, 2, 8), torch.randn(T, 2, 8), torch.randn(T, heads, 12), -torch.rand(T, heads)]
    inputs = [x.to(dtype) for x in (*inputs, torch.rand(T, heads))]
    before = [x[split.of_prompts] for x in inputs]
    first, state = chunk_gated_delta_rule_and_state(*before, split.prompts)
    assert torch.equal(first, kernels.chunk_gated_delta_rule(*before, split.prompts))
    assert state.dtype == torch.promote_types(dtype, torch.float32) and state.shape == (len(lengths), heads, 8, 12)
    kept = state.data_ptr()
    steps = [gated_delta_rule_step(*(x[rows] for x in inputs), state) for rows in split.of_steps]
    assert state.data_ptr() == kept
    split.compare(first, steps, reference.chunk_gated_delta_rule(*(x.double() for x in inputs), split.whole), tolerance)


@pytest.mark.parametrize("gate", [0.0, -60.0], ids=["open", "closed"])
@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["beta 0", "beta 1"])
def test_gated_delta_rule_at_the_ends_of_its_gates(gate, rate):
    split = Split([65, 3])
    T = split.total
    inputs = [torch.randn(T, 1, 16), torch.randn(T, 1, 16), torch.randn(T, 2, 8)]
    inputs += [torch.full((T, 2), gate), torch.full((T, 2), rate)]
    first, state = chunk_gated_delta_rule_and_state(*(x[split.of_prompts] for x in inputs), split.prompts)
    steps = [gated_delta_rule_step(*(x[rows] for x in inputs), state) for rows in split.of_steps]
    split.compare(first, steps, reference.chunk_gated_delta_rule(*(x.double() for x in inputs), split.whole), 1e-6)


def test_the_state_of_sequences_without_tokens_is_zero():
    inputs = [torch.randn(7, 1, 4), torch.randn(7, 1, 4), torch.randn(7, 2, 3), -torch.rand(7, 2), torch.rand(7, 2)]
    _, state = chunk_gated_delta_rule_and_state(*inputs, cu([0, 7, 0]))
    _, alone = chunk_gated_delta_rule_and_state(*inputs, cu([7]))
    assert torch.equal(state[1], alone[0]) and state[1].any() and not state[0].any() and not state[2].any()
    _, none = chunk_gated_delta_rule_and_state(*(x[:0] for x in inputs), cu([0, 0]))
    assert none.shape == (2, 2, 4, 3) and not none.any()


@SIZES
@DTYPES
@pytest.mark.parametrize("width", [1, 4])
def test_causal_conv1d(lengths, dtype, tolerance, width):
    split = Split(lengths)
    x, weight = torch.randn(split.total, 10).to(dtype), torch.randn(10, width).to(dtype)
    tail = last_inputs(x[split.of_prompts], split.prompts, width - 1)
    assert tail.shape == (len(lengths), 10, width - 1) and tail.dtype == dtype
    kept = tail.data_ptr()
    first = kernels.causal_conv1d(x[split.of_prompts], weight, split.prompts)
    steps = [causal_conv1d_step(x[rows], weight, tail) for rows in split.of_steps]
    assert tail.data_ptr() == kept
    split.compare(first, steps, reference.causal_conv1d(x.double(), weight.double(), split.whole), tolerance)


@SIZES
@DTYPES
@pytest.mark.parametrize("heads", [2, 6])
def test_attention(lengths, dtype, tolerance, heads):
    """The cache is longer than any sequence; what lies behind a sequence does not count."""
    split = Split(lengths)
    T = split.total
    q, k, v = (torch.randn(T, n, 8).to(dtype) for n in (heads, 2, 2))
    truth = reference.varlen_attention(q.double(), k.double(), v.double(), split.whole, causal=True, scale=0.3)
    steps = []
    for i, rows in enumerate(split.of_steps):
        keys, values = (torch.full((len(lengths), max(lengths) + 9, 2, 8), 7.0, dtype=dtype) for _ in range(2))
        counts = torch.tensor(lengths) + i + 1
        for s, (start, count) in enumerate(zip(split.whole.tolist(), counts.tolist(), strict=False)):
            keys[s, :count], values[s, :count] = k[start : start + count], v[start : start + count]
        steps.append(attention_step(q[rows], keys, values, counts, 0.3))
    first = kernels.varlen_attention(*(x[split.of_prompts] for x in (q, k, v)), split.prompts, True, 0.3)
    split.compare(first, steps, truth, tolerance)


def test_the_mask_has_a_row_for_each_query(monkeypatch):
    """op-plugin takes [B, 1, Sq, Skv]; only its newer releases broadcast a mask of one row."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, attn_mask, scale):
        seen.append((tuple(attn_mask.shape), (len(q), 1, q.shape[2], k.shape[2])))
        return attend(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr("kernels.decode.F.scaled_dot_product_attention", record)
    attention_step(
        torch.ones(3, 8, 16), torch.ones(3, 5, 2, 16), torch.ones(3, 5, 2, 16), torch.tensor([1, 3, 5]), 0.25
    )
    assert seen == [((3, 1, 4, 5), (3, 1, 4, 5))]
