"""Every op against kernels/reference.py: forward and all gradients, odd lengths, extreme gates."""

import itertools
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import kernels
from kernels import gated_delta_rule, native, reference

LENGTHS = [[1], [2], [63], [64], [65], [127], [200], [1000], [1, 1, 64, 3, 130, 1], [1, 2, 3, 2, 2] * 20]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12))


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def compare(op: str, inputs: list, *rest, dtype=torch.float32, tolerance=2e-5) -> None:
    """Compare the op in `dtype` with the fp64 reference on the same rounded inputs."""
    mine = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in mine]
    ours, theirs = getattr(kernels, op)(*mine, *rest), getattr(reference, op)(*exact, *rest)
    ours, theirs = ((x,) if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
    probes = [torch.randn(y.shape, dtype=torch.float64) for y in theirs]
    sum((y.double() * p).sum() for y, p in zip(ours, probes, strict=True)).backward()
    sum((y * p).sum() for y, p in zip(theirs, probes, strict=True)).backward()
    for i, (y, z) in enumerate(zip(ours, theirs, strict=True)):
        assert y.dtype == dtype and y.shape == z.shape
        assert error(y, z) <= tolerance, f"{op} output {i}: {error(y, z):.1e}"
    for i, (x, z) in enumerate(zip(mine, exact, strict=True)):
        assert x.grad.dtype == dtype
        assert error(x.grad, z.grad) <= tolerance, f"{op} gradient {i}: {error(x.grad, z.grad):.1e}"


DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gated_delta_rule(lengths, dtype, tolerance):
    T = sum(lengths)
    q, k, v = torch.randn(T, 2, 8), torch.randn(T, 2, 8), torch.randn(T, 6, 12)
    g, beta = -torch.rand(T, 6), torch.rand(T, 6)
    compare("chunk_gated_delta_rule", [q, k, v, g, beta], cu(lengths), dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("gate", [0.0, -1e-6, -60.0], ids=["open", "nearly open", "closed"])
@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["beta 0", "beta 1"])
def test_gated_delta_rule_at_the_ends_of_its_gates(gate, rate):
    T = 130
    q, k, v = torch.randn(T, 1, 16), torch.randn(T, 1, 16), torch.randn(T, 2, 8)
    g, beta = torch.full((T, 2), gate), torch.full((T, 2), rate)
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta)]
    out = kernels.chunk_gated_delta_rule(*leaves, cu([65, 65]))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = reference.chunk_gated_delta_rule(*exact, cu([65, 65]))
    assert (out - truth).abs().max() <= 1e-5
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (truth * probe).sum().backward()
    for x, z in zip(leaves, exact, strict=True):
        assert (x.grad - z.grad).abs().max() <= 1e-4 * z.grad.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_is_exp_but_never_denormal(dtype):
    log = torch.linspace(-200, 0, 4001, dtype=dtype)
    found = gated_delta_rule._decay(log)
    torch.testing.assert_close(found, log.exp(), rtol=1e-6, atol=2**-100)
    assert found[0] == 0 and found[found > 0].min() > 2**-100


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_causal_conv1d(lengths, dtype, tolerance):
    inputs = [torch.randn(sum(lengths), 10), torch.randn(10, 4)]
    compare("causal_conv1d", inputs, cu(lengths), dtype=dtype, tolerance=tolerance)


@DTYPES
@pytest.mark.parametrize(
    "lengths", [*LENGTHS[1:], [0, 5, 0, 5, 5, 0]], ids=str
)  # a single token has its own test below
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attention(lengths, causal, dtype, tolerance):
    T = sum(lengths)
    inputs = [torch.randn(T, 4, 8), torch.randn(T, 2, 8), torch.randn(T, 2, 8)]
    compare("varlen_attention", inputs, cu(lengths), causal, 0.3, dtype=dtype, tolerance=tolerance)


def test_attention_over_one_token_returns_its_value():
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    out = kernels.varlen_attention(q, k, v, cu([1, 1, 1]), True, 0.3)
    assert torch.equal(out, v.repeat_interleave(2, dim=1))


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 1000])
def test_moe_experts(tokens, dtype, tolerance):
    ids = torch.rand(tokens, 6).topk(2).indices
    ids[ids == 3] = 7  # experts 3 and 6 and one of the last two get no tokens
    weights = torch.rand(tokens, 2)
    x, gate_up, down = torch.randn(tokens, 16), torch.randn(8, 48, 16), torch.randn(8, 16, 24)

    def run(module, x, weights, gate_up, down):
        return module.moe_experts(x, ids, weights, gate_up, down)

    mine = [t.to(dtype).requires_grad_() for t in (x, weights, gate_up, down)]
    exact = [t.detach().double().requires_grad_() for t in mine]
    ours, theirs = run(kernels, *mine), run(reference, *exact)
    probe = torch.randn_like(theirs)
    (ours.double() * probe).sum().backward()
    (theirs * probe).sum().backward()
    assert error(ours, theirs) <= tolerance
    for a, b in zip(mine, exact, strict=True):
        assert error(a.grad, b.grad) <= tolerance
    assert not mine[2].grad[3].any() and not mine[3].grad[6].any()


def test_moe_experts_of_odd_sizes():
    ids, weights = torch.rand(9, 6).topk(2).indices, torch.rand(9, 2)
    x, gate_up, down = torch.randn(9, 21), torch.randn(8, 14, 21), torch.randn(8, 21, 7)
    ours = kernels.moe_experts(x, ids, weights, gate_up, down)
    assert error(ours, reference.moe_experts(x, ids, weights, gate_up, down)) <= 1e-6


def test_moe_experts_without_tokens():
    x, gate_up, down = torch.randn(0, 16, requires_grad=True), torch.randn(8, 48, 16), torch.randn(8, 16, 24)
    out = kernels.moe_experts(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), gate_up, down)
    out.sum().backward()
    assert out.shape == (0, 16) and x.grad.shape == (0, 16)


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 64, 65, 127, 1000])
@pytest.mark.parametrize("block", [1 << 18, 300], ids=["one block", "many blocks"])
def test_norms_rotary_and_swiglu(rows, block, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(kernels.native, "BLOCK", block)
    compare("rms_norm", [torch.randn(rows, 3, 32), torch.randn(32)], 1e-6, dtype=dtype, tolerance=tolerance)
    inputs = [torch.randn(rows, 32), torch.randn(rows, 32), torch.randn(32)]
    compare("rms_norm_gated", inputs, 1e-6, dtype=dtype, tolerance=tolerance)
    angle = torch.randn(rows, 4)
    rotary = [torch.randn(rows, 4, 32), torch.randn(rows, 2, 32)]
    compare("apply_rotary", rotary, angle.cos(), angle.sin(), dtype=dtype, tolerance=tolerance)
    compare("swiglu", [torch.randn(rows, 48)], dtype=dtype, tolerance=tolerance)


def test_elementwise_ops_take_views_and_any_shape():
    """Query and gate are views of one projection's output."""
    both = torch.randn(9, 4, 64, requires_grad=True)
    q, gate = both.chunk(2, dim=-1)
    weight, angle = torch.randn(32), torch.randn(9, 4)
    normed, gated = kernels.rms_norm(q, weight, 1e-6), kernels.rms_norm_gated(q, gate, weight, 1e-6)
    turned, _ = kernels.apply_rotary(gate, gate, angle.cos(), angle.sin())
    assert error(normed, reference.rms_norm(q, weight, 1e-6)) <= 1e-6
    assert error(gated, reference.rms_norm_gated(q, gate, weight, 1e-6)) <= 1e-6
    assert error(turned, reference.apply_rotary(gate, gate, angle.cos(), angle.sin())[0]) <= 1e-6
    assert error(kernels.swiglu(both), reference.swiglu(both)) <= 1e-6
    (normed.sum() + gated.sum() + turned.sum() + kernels.swiglu(both).sum()).backward()
    assert both.grad.shape == both.shape and both.grad.isfinite().all()


@DTYPES
def test_primitives_of_the_experts(dtype, tolerance):
    """Each primitive against its definition; expert 3 gets no tokens."""
    ids = torch.rand(30, 6).topk(2).indices
    ids[ids == 3] = 7
    x, weights = torch.randn(30, 16).to(dtype), torch.rand(30, 2)
    rows, place, ends = native.permute(x, ids, 8)
    assert place.dtype == torch.int32 and ends.dtype == torch.int64 and ends.shape == (8,)
    assert torch.equal(rows[place.long()], x.repeat_interleave(2, dim=0))
    assert ends.tolist() == [int((ids <= e).sum()) for e in range(8)]
    grad = torch.randn(60, 16).to(dtype)
    assert (
        error(native.permute_backward(grad, place, 2), grad[place.long()].double().view(30, 2, 16).sum(1)) <= tolerance
    )

    y = torch.einsum("tkh,tk->th", rows[place.long()].view(30, 2, 16).double(), weights.double())
    assert error(native.unpermute(rows, place, weights), y) <= tolerance
    assert torch.equal(native.sorted_rows(x, ids, place), rows)
    weight, mine, its = torch.rand(60, 1), rows.clone(), grad.clone()
    dots, its = native.weigh(mine, its, weight)
    assert error(dots, (rows.double() * grad.double()).sum(-1)) <= tolerance
    for weighed, plain in ((mine, rows), (its, grad)):
        assert weighed.dtype == dtype and error(weighed, plain.double() * weight) <= tolerance

    matrix = torch.randn(8, 24, 16).to(dtype)
    bounds = [0, *ends.tolist()]
    groups = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    product = torch.cat([rows[g].double() @ matrix[e].double().T for e, g in enumerate(groups)])
    assert error(native.grouped_matmul(rows, matrix.mT, ends), product) <= tolerance
    other = torch.randn(60, 24).to(dtype)
    sums = torch.stack([rows[g].double().T @ other[g].double() for g in groups])
    assert error(native.grouped_weight_grad(rows, other, ends), sums) <= tolerance
    assert not native.grouped_weight_grad(rows, other, ends)[3].any()


@pytest.mark.parametrize("frozen", range(4))
def test_moe_experts_with_one_input_frozen(frozen):
    ids = torch.rand(20, 6).topk(2).indices
    tensors = [torch.randn(20, 16), torch.rand(20, 2), torch.randn(8, 48, 16), torch.randn(8, 16, 24)]
    mine = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(tensors)]
    exact = [x.double().requires_grad_() for x in tensors]
    kernels.moe_experts(mine[0], ids, *mine[1:]).sum().backward()
    reference.moe_experts(exact[0], ids, *exact[1:]).sum().backward()
    for i, (a, b) in enumerate(zip(mine, exact, strict=True)):
        assert a.grad is None if i == frozen else error(a.grad, b.grad) <= 2e-5


def saved_bytes(run) -> int:
    """The bytes that autograd saves during `run`, each storage once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    assert result is not None
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_backward_saves_little():
    """Only inputs and a few numbers per row are saved, and gate_up's output of the experts."""
    T, D, K, inner = 128, 64, 2, 32
    x, z = (torch.randn(T, D, requires_grad=True) for _ in range(2))
    weight = torch.randn(D, requires_grad=True)
    row, matrix = T * 4, T * D * 4
    assert saved_bytes(lambda: kernels.rms_norm(x, weight, 1e-6)) <= matrix + D * 4 + row
    assert saved_bytes(lambda: kernels.rms_norm_gated(x, z, weight, 1e-6)) <= 2 * matrix + D * 4 + row
    assert saved_bytes(lambda: kernels.swiglu(x)) == matrix
    taps = torch.randn(D, 4, requires_grad=True)
    assert saved_bytes(lambda: kernels.causal_conv1d(x, taps, cu([T]))) == matrix + D * 16
    gate_up, down = torch.randn(8, 2 * inner, D, requires_grad=True), torch.randn(8, D, inner, requires_grad=True)
    ids, weights = torch.rand(T, 8).topk(K).indices, torch.rand(T, K, requires_grad=True)
    kept = saved_bytes(lambda: kernels.moe_experts(x, ids, weights, gate_up, down))
    parameters = (gate_up.numel() + down.numel()) * 4
    choices = 5 * K * row  # 8-byte ids, which the router saves too, 4-byte weights and row_of_slot, and some slack
    assert kept - parameters <= matrix + T * K * 2 * inner * 4 + choices + 64


@pytest.mark.parametrize("chunk", [1 << 25, 1], ids=["one chunk", "many chunks"])
def test_linear_cross_entropy(chunk, monkeypatch):
    monkeypatch.setattr(kernels.cross_entropy, "CHUNK_LOGITS", chunk)
    labels = torch.randint(0, 50, (100,))
    labels[::3] = -100
    weights = torch.rand(100)
    mine = [torch.randn(100, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in mine]
    loss, token_loss = kernels.linear_cross_entropy(*mine, labels, weights)
    truth, token_truth = reference.linear_cross_entropy(*exact, labels, weights.double())
    (loss * 3).backward()
    (truth * 3).backward()
    assert error(loss, truth) <= 1e-6 and error(token_loss, token_truth) <= 1e-6 and not token_loss.requires_grad
    for a, b in zip(mine, exact, strict=True):
        assert error(a.grad, b.grad) <= 1e-6


def test_linear_cross_entropy_in_bf16_stays_near_fp32():
    labels = torch.randint(0, 300, (64,))
    hidden, weight = (torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(300, 32).bfloat16().requires_grad_())
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss, _ = kernels.linear_cross_entropy(hidden, weight, labels, torch.ones(64) / 64)
    truth, _ = reference.linear_cross_entropy(*exact, labels, torch.ones(64) / 64)
    loss.backward()
    truth.backward()
    assert loss.dtype == torch.float32 and error(loss, truth) <= 5e-3
    assert error(hidden.grad, exact[0].grad) <= 2e-2 and error(weight.grad, exact[1].grad) <= 2e-2


@pytest.mark.parametrize("chunk", [1 << 25, 1], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("count", [0, 1, 17, 100])
def test_token_log_probs(chunk, count, monkeypatch):
    """The gradient of any function of them, and none of a weight that is frozen."""
    monkeypatch.setattr(kernels.cross_entropy, "CHUNK_LOGITS", chunk)
    rows = torch.randperm(100)[:count].sort().values
    labels = torch.full((100,), -100)
    labels[rows] = torch.randint(0, 50, (count,))
    mine = [torch.randn(100, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in mine]
    truth = reference.token_log_probs(*exact, labels)
    grads = torch.autograd.grad(truth.square().sum(), exact)
    for given in (rows, None):
        ours = kernels.token_log_probs(*mine, labels, given)
        assert ours.dtype == torch.float32 and not ours[labels < 0].any()
        assert torch.allclose(ours.double(), truth, rtol=1e-6, atol=1e-6)
        for a, b in zip(torch.autograd.grad(ours.square().sum(), mine), grads, strict=True):
            assert error(a, b) <= 2e-6
        token_loss = kernels.linear_cross_entropy(*mine, labels, torch.ones(100), given)[1]
        assert torch.equal(-token_loss, ours)  # the same bits
    hidden, frozen = mine[0], mine[1].detach()
    monkeypatch.setattr(native, "head_weight_grad", None)  # which would be called
    ours = kernels.token_log_probs(hidden, frozen, labels, rows).square().sum()
    assert error(torch.autograd.grad(ours, hidden)[0], grads[0]) <= 2e-6


def test_no_head_ever_holds_all_logits(monkeypatch):
    monkeypatch.setattr(kernels.cross_entropy, "CHUNK_LOGITS", 16 * 1000)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    labels, ones = torch.randint(0, 1000, (256,)), torch.ones(256)
    for loss in (
        lambda: kernels.linear_cross_entropy(hidden, weight, labels, ones)[0],
        lambda: kernels.token_log_probs(hidden, weight, labels).sum(),
    ):
        with Largest() as largest:
            loss().backward()
        assert largest.size == 16 * 1000  # of 256,000


def test_no_labels_give_zero_loss_and_zero_gradients():
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss, _ = kernels.linear_cross_entropy(hidden, weight, torch.full((7,), -100), torch.zeros(7))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("given", [True, False], ids=["rows given", "rows found"])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100])
def test_linear_cross_entropy_with_any_number_of_labels(count, given, monkeypatch):
    """The last chunk is padded with a repeated row, which must not count twice."""
    monkeypatch.setattr(kernels.cross_entropy, "CHUNK_LOGITS", 1)
    rows = torch.randperm(100)[:count].sort().values
    labels = torch.full((100,), -100)
    labels[rows] = torch.randint(0, 50, (count,))
    mine = [torch.randn(100, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in mine]
    weights = torch.rand(100)
    loss, token_loss = kernels.linear_cross_entropy(*mine, labels, weights, rows if given else None)
    truth, token_truth = reference.linear_cross_entropy(*exact, labels, weights.double())
    assert error(loss, truth) <= 1e-6 and error(token_loss, token_truth) <= 1e-6
    if count:
        for a, b in zip(torch.autograd.grad(loss, mine), torch.autograd.grad(truth, exact), strict=True):
            assert error(a, b) <= 1e-6


def test_a_converged_token_keeps_its_small_gradient():
    """1 - p at the target is computed in fp32: with p rounded to bf16 near 1 it would vanish."""
    hidden, weight = torch.zeros(1, 16), torch.zeros(40, 16)
    hidden[0, 0], weight[3, 0] = 1, 12
    leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    label = torch.tensor([3])
    kernels.linear_cross_entropy(*leaves, label, torch.ones(1))[0].backward()
    reference.linear_cross_entropy(*exact, label, torch.ones(1).double())[0].backward()
    assert error(leaves[0].grad, exact[0].grad) <= 1e-2 and error(leaves[1].grad, exact[1].grad) <= 1e-2


@pytest.mark.parametrize("op", ["chunk_gated_delta_rule", "causal_conv1d", "varlen_attention"])
def test_packed_equals_separate(op):
    """A sequence's outputs and gradients do not depend on its neighbours, even if those are NaN."""
    lengths = [70, 1, 5, 5, 64]
    T = sum(lengths)
    if op == "causal_conv1d":
        tensors, rest = [torch.randn(T, 6)], (torch.randn(6, 4),)
    else:
        tensors, rest = [torch.randn(T, 4, 8), torch.randn(T, 2, 8), torch.randn(T, 2, 8)], ()
    if op == "chunk_gated_delta_rule":
        tensors = [tensors[1], tensors[2], tensors[0], -torch.rand(T, 4), torch.rand(T, 4)]
    after = (True, 0.3) if op == "varlen_attention" else ()
    probe = torch.randn(tensors[2 if op == "chunk_gated_delta_rule" else 0].shape)

    def run(some, lengths, probe):
        leaves = [x.clone().requires_grad_() for x in some]
        out = getattr(kernels, op)(*leaves, *rest, cu(lengths), *after)
        return out, *torch.autograd.grad(out, leaves, probe)

    start = 0
    for number, length in enumerate(lengths):
        seq = slice(start, start + length)
        alone = run([x[seq] for x in tensors], [length], probe[seq])
        poisoned = [x.clone() for x in tensors]
        for x in poisoned:
            x[: seq.start], x[seq.stop :] = float("nan"), float("nan")
        for packed in (tensors, poisoned):
            for a, b in zip(alone, run(packed, lengths, probe), strict=True):
                assert (a - b[seq]).abs().max() <= 1e-5, (op, number)
        start += length


def test_gradients_in_fp64():
    T, bounds = 9, cu([4, 5])
    d = {"dtype": torch.float64, "requires_grad": True}
    q, k, v, b = torch.randn(T, 1, 3, **d), torch.randn(T, 1, 3, **d), torch.randn(T, 2, 2, **d), torch.rand(T, 2, **d)
    g = (-torch.rand(T, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: kernels.chunk_gated_delta_rule(*x, bounds), (q, k, v, g, b))
    x, w = torch.randn(T, 3, **d), torch.randn(3, 4, **d)
    assert torch.autograd.gradcheck(lambda *a: kernels.causal_conv1d(*a, bounds), (x, w))
    q, k, v = torch.randn(T, 4, 6, **d), torch.randn(T, 2, 6, **d), torch.randn(T, 2, 6, **d)
    assert torch.autograd.gradcheck(lambda *a: kernels.varlen_attention(*a, bounds, True, 0.3), (q, k, v))
    angle = torch.randn(T, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: kernels.apply_rotary(*a, angle.cos(), angle.sin()), (q, k))
    x, z, w = torch.randn(T, 2, 4, **d), torch.randn(T, 2, 4, **d), torch.randn(4, **d)
    assert torch.autograd.gradcheck(lambda *a: kernels.rms_norm(*a, 1e-6), (x, w))
    assert torch.autograd.gradcheck(lambda *a: kernels.rms_norm_gated(*a, 1e-6), (x, z, w))
    assert torch.autograd.gradcheck(kernels.swiglu, (x,))
    ids, scale = torch.rand(T, 4).topk(2).indices, torch.rand(T, 2, **d)
    inputs = torch.randn(T, 3, **d), scale, torch.randn(5, 4, 3, **d), torch.randn(5, 3, 2, **d)
    assert torch.autograd.gradcheck(
        lambda x, w, *p: kernels.moe_experts(x, ids, w, *p), inputs
    )  # expert 4 gets no tokens
    labels = torch.tensor([0, 1, -100, 2, 3, 4, 0, 1, 2])
    inputs = (torch.randn(T, 3, **d), torch.randn(5, 3, **d))
    scale = torch.rand(T, dtype=torch.float64)
    loss, steps = kernels.linear_cross_entropy(*inputs, labels, scale)[0], [1e-6 * torch.randn_like(x) for x in inputs]
    grads = torch.autograd.grad(7 * loss, inputs, retain_graph=True)
    further, back = (
        kernels.linear_cross_entropy(*(x + sign * s for x, s in zip(inputs, steps, strict=True)), labels, scale)[0]
        for sign in (1, -1)
    )
    assert torch.allclose(7 * (further - back) / 2, sum((g * s).sum() for g, s in zip(grads, steps, strict=True)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # not the gradient times 7
        torch.autograd.grad(loss, inputs)
    assert torch.autograd.gradcheck(lambda *a: kernels.token_log_probs(*a, labels), inputs)


# -- selection -------------------------------------------------------------------------------------


def test_select_has_no_silent_fallback():
    assert kernels.select("cpu") == kernels.Kernels()
    others = dict.fromkeys(kernels.OPS, "native")
    for choices, op, package, install, alternatives in (
        ({}, "chunk_gated_delta_rule", "triton", "triton-ascend 3.2.0 for CANN 8.5", "fla or native"),
        (dict.fromkeys(kernels.FLA_OPS, "native"), "moe_experts", "torch_npu", "make install DEVICE=npu", "native"),
        ({"gated_delta_rule": "fla"}, "chunk_gated_delta_rule", "fla", "pip install fla-core", "triton or native"),
        # `auto` requires the same package, so that it is no alternative
        (others | {"moe_experts_parallel": "alltoallv_gmm"}, "moe_experts_parallel", "torch_npu", "sourced", "native"),
    ):
        with pytest.raises(kernels.KernelError) as error:
            kernels.select("npu", choices)
        message = str(error.value)
        assert message.startswith(f"{op}: {package} cannot be imported") and "\n" not in message
        assert install in message and f"model.kernels.{op} to {alternatives}" in message
    assert kernels.select("npu", others) == kernels.Kernels()


def test_import_kernels_is_quick_and_free_of_torch_npu():
    code = "import sys, kernels; assert not {'torch_npu', 'fla', 'triton', 'kernels.npu', 'kernels.triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_only_triton_ascend_is_accepted_on_an_npu(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "triton"
    ]:  # the triton that torch's CUDA builds install
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        kernels.KernelError, match=r"triton cannot be imported \(No module named 'triton.backends'\); .*ascend"
    ):
        kernels.select("npu")
    del sys.modules["triton"]


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"gated_delta_rul": "auto"}, "no op is named gated_delta_rul"),
        ({"gated_delta_rule": "triton"}, "model.kernels.chunk_gated_delta_rule: 'triton' is not one of auto, native"),
        ({"gated_delta_rule": "auto", "chunk_gated_delta_rule": "native"}, "are the same op; give one of them"),
        ({"swiglu": "fused"}, "'fused' is not one of auto, native"),
        ({"swiglu": "torch_npu"}, "'torch_npu' is not one of auto, native"),
    ],
)
def test_select_refuses_unknown_names(choices, words):
    with pytest.raises(kernels.KernelError, match=words):
        kernels.select("cpu", choices)


def test_the_table_prints_and_the_name_does_not_break_transformers():
    """transformers probes for a package named kernels and finds this one in the project's root."""
    root = Path(__file__).parents[2]
    table = subprocess.run(
        [sys.executable, "-m", "kernels"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert all(op in table for op in kernels.OPS)
    code = "import kernels; assert kernels.__version__ == '0.0.0'; import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)


def test_values_derived_from_lengths_are_computed_once_and_freed_with_them():
    lengths, q = cu([70, 3]), torch.randn(73, 2, 8)
    v, g, beta = torch.randn(73, 4, 8), -torch.rand(73, 4), torch.rand(73, 4)
    first = kernels.chunk_gated_delta_rule(q, q, v, g, beta, lengths)
    made = gated_delta_rule.sequence_groups(lengths, 16, q.device)
    assert (
        made
        is gated_delta_rule.sequence_groups(lengths, 16, q.device)
        is not gated_delta_rule.sequence_groups(lengths, 8, q.device)
    )
    assert made is not gated_delta_rule.sequence_groups(lengths.clone(), 16, q.device)
    assert torch.equal(first, kernels.chunk_gated_delta_rule(q, q, v, g, beta, lengths.clone()))
    group = weakref.ref(made[0][0])
    del made
    assert group() is not None
    del lengths
    assert group() is None
