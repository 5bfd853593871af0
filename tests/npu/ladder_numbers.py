"""Rung 3, numbers: the NPU ops on CPU tensors, with bodies.py as operators, equal reference.py."""

from types import SimpleNamespace

import pytest
import torch
from bodies import error, install
from fused import fused

import kernels
from kernels import npu, reference
from kernels.moe_lora import ExpertAdapters

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)


@pytest.fixture(scope="module", autouse=True)
def documented_bodies():
    library = install()
    yield
    library._destroy()


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def strided(y: torch.Tensor) -> torch.Tensor:
    """Random numbers in y's shape and dtype, every second one of a larger tensor."""
    return torch.randn(*y.shape[:-1], 2 * y.shape[-1]).to(y.dtype)[..., ::2]


def compare(op: str, inputs: list, *rest, dtype=torch.float32, tolerance=2e-5) -> None:
    """Compare the NPU op in `dtype` with the fp64 reference: outputs, gradients of strided ones."""
    ours_in = [x.to(dtype).requires_grad_() for x in inputs]
    exact_in = [x.detach().double().requires_grad_() for x in ours_in]
    ours, exact = getattr(fused, op)(*ours_in, *rest), getattr(reference, op)(*exact_in, *rest)
    ours, exact = ((x,) if isinstance(x, torch.Tensor) else x for x in (ours, exact))
    probes = [strided(y) for y in ours]
    torch.autograd.backward(ours, probes)
    torch.autograd.backward(exact, [p.double() for p in probes])
    for y, z in zip(ours, exact, strict=True):
        assert y.dtype == dtype and y.shape == z.shape and error(y, z) <= tolerance, (op, error(y, z))
    for i, (x, z) in enumerate(zip(ours_in, exact_in, strict=True)):
        assert x.grad.dtype == dtype and error(x.grad, z.grad) <= tolerance, (op, i, error(x.grad, z.grad))


@DTYPES
@pytest.mark.parametrize("lengths", [[2], [65], [1, 1, 64, 3, 0, 130, 1]], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attention(lengths, causal, dtype, tolerance):
    T = sum(lengths)
    inputs = [torch.randn(T, 4, 8), torch.randn(T, 2, 8), torch.randn(T, 2, 8)]
    compare("varlen_attention", inputs, cu(lengths), causal, 0.3, dtype=dtype, tolerance=tolerance)


def test_more_sequences_than_the_fused_attention_takes():
    lengths = [2] * (npu.SEQUENCES + 5)
    q, k, v = (torch.randn(sum(lengths), 1, 4) for _ in range(3))
    out = fused.varlen_attention(q, k, v, cu(lengths), False, 0.5)
    assert error(out, reference.varlen_attention(q, k, v, cu(lengths), False, 0.5)) <= 1e-5


@pytest.mark.parametrize("sequences", [1024, 2], ids=["one call", "several calls"])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 4), (0, 1, 3, 4)], ids=str)
def test_attention_with_prepare(sequences, frozen, monkeypatch):
    """With a `prepare` of q and k, of which nothing is saved: gradients of all inputs."""
    monkeypatch.setattr(npu, "SEQUENCES", sequences)
    lengths = cu([5, 17, 1, 0, 9])
    shapes = [(32, 4, 8), (32, 2, 8), (32, 2, 8), (8,), (32, 1, 8)]
    ours = [torch.randn(s).requires_grad_(i not in frozen) for i, s in enumerate(shapes)]
    exact = [x.detach().double().requires_grad_() for x in ours]

    def prepare(q, k, scale, shift):
        return (q * scale).sin(), k * scale + shift

    def kept(x):
        kept.bytes += x.nbytes
        return x

    kept.bytes = 0
    q, k, v, scale, shift = ours
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
        y = fused.varlen_attention(q, k, v, lengths, True, 0.3, prepare, (scale, shift))
    statistics = 2 * 32 * 4 * 8 * 4
    assert kept.bytes <= sum(x.nbytes for x in (*ours, y)) + statistics + 64
    q, k, v, scale, shift = exact
    z = reference.varlen_attention(*prepare(q, k, scale, shift), v, lengths, True, 0.3)
    probe = torch.randn_like(z)
    (y.double() * probe).sum().backward()
    (z * probe).sum().backward()
    assert error(y, z) <= 2e-5
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert (a.grad is None) if i in frozen else error(a.grad, b.grad) <= 2e-5


def test_attention_without_tokens():
    q = torch.randn(0, 4, 8)
    assert fused.varlen_attention(q, q, q, cu([]), True, 0.3).shape == (0, 4, 8)


@DTYPES
def test_norms_rotary_and_swiglu(dtype, tolerance):
    how = {"dtype": dtype, "tolerance": tolerance}
    compare("rms_norm", [torch.randn(5, 7, 32), torch.randn(32)], 1e-6, **how)
    compare("rms_norm_gated", [torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)], 1e-6, **how)
    angle = torch.randn(9, 4)
    compare("apply_rotary", [torch.randn(9, 4, 32), torch.randn(9, 2, 32)], angle.cos(), angle.sin(), **how)
    compare(
        "apply_rotary", [torch.randn(9, 4, 8), torch.randn(9, 2, 8)], angle.cos(), angle.sin(), **how
    )  # the whole head
    compare("swiglu", [torch.randn(9, 48)], **how)
    x = torch.randn(48, 9).T.to(dtype)  # strided, with a strided gradient
    grad, (a, b) = strided(x[:, :24]), x.double().chunk(2, 1)
    assert error(npu.swiglu(x), reference.swiglu(x.double())) <= tolerance
    s = a.sigmoid()
    exact = torch.cat([b * (s + a * s * (1 - s)), a * s], 1) * torch.cat([grad, grad], 1)
    assert error(npu.swiglu_backward(grad, x), exact) <= tolerance


def test_norms_with_fp32_weights_and_bf16_tokens():
    """Replicated parameters: the weight keeps its precision and its gradient its dtype."""
    x, gate, weight = torch.randn(7, 32), torch.randn(7, 32), torch.randn(32)
    for op, inputs in (("rms_norm", [x]), ("rms_norm_gated", [x, gate])):
        ours = [t.bfloat16().requires_grad_() for t in inputs] + [weight.clone().requires_grad_()]
        exact = [t.detach().double().requires_grad_() for t in ours]
        y, z = getattr(fused, op)(*ours, 1e-6), getattr(reference, op)(*exact, 1e-6)
        y.float().square().sum().backward()
        z.square().sum().backward()
        assert y.dtype == torch.bfloat16 and ours[-1].grad.dtype == torch.float32
        for a, b in zip(ours, exact, strict=True):
            assert error(a.grad, b.grad) <= 2e-2, op


def choices(tokens: int, experts: int = 8, top_k: int = 2) -> torch.Tensor:
    ids = torch.rand(tokens, experts - 2).topk(top_k).indices
    ids[ids == 3] = experts - 1  # expert 3 and the last but one get no tokens
    return ids


@DTYPES
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_primitives_of_the_experts(tokens, dtype, tolerance):
    """Each primitive against its definition, forward and backward."""
    ids = choices(tokens)
    x = torch.randn(tokens, 16).to(dtype)
    rows, place, ends = npu.permute(x, ids, 8)
    slots = ids.flatten()
    assert place.dtype == torch.int32 and ends.dtype == torch.int64 and len(place.unique()) == 2 * tokens
    assert ends.tolist() == [int((slots <= e).sum()) for e in range(8)]
    of_row = torch.empty_like(slots)
    of_row[place.long()] = slots
    assert bool((of_row.diff() >= 0).all())  # by expert
    assert torch.equal(rows[place.long()], x.repeat_interleave(2, 0))

    weights = torch.rand(tokens, 2)
    back = npu.unpermute(rows, place, weights)
    assert error(back, (x.double() * weights.sum(1, keepdim=True))) <= tolerance
    assert torch.equal(npu.sorted_rows(x, ids, place), rows)
    grads, weight = torch.randn(2 * tokens, 16).to(dtype), torch.rand(2 * tokens, 1)
    of_token = grads[place.long()].double().view(tokens, 2, 16).sum(1)
    assert error(npu.permute_backward(grads, place, 2), of_token) <= tolerance
    mine, its = rows.clone(), grads.clone()
    dots, its = npu.weigh(mine, its, weight)
    assert dots.dtype == weight.dtype and error(dots, (rows.double() * grads.double()).sum(-1)) <= tolerance
    for weighed, plain in ((mine, rows), (its, grads)):
        assert weighed.dtype == dtype and error(weighed, plain.double() * weight) <= tolerance

    for weight in (torch.randn(8, 16, 12).to(dtype), torch.randn(8, 12, 16).to(dtype).transpose(1, 2)):
        y = npu.grouped_matmul(rows, weight, ends)
        exact = torch.stack([r.double() @ weight[e].double() for r, e in zip(rows, of_row, strict=True)])
        assert y.dtype == dtype and error(y, exact) <= tolerance
    other = torch.randn(2 * tokens, 12).to(dtype)
    exact = torch.zeros(8, 16, 12, dtype=torch.float64)
    for r, o, e in zip(rows, other, of_row, strict=True):
        exact[e] += r.double()[:, None] * o.double()
    found = npu.grouped_weight_grad(rows, other, ends)
    assert found.dtype == dtype and error(found, exact) <= tolerance and not found[3].any()


def test_primitives_of_the_experts_without_tokens():
    rows, place, ends = npu.permute(torch.randn(0, 16), torch.zeros(0, 2, dtype=torch.long), 8)
    assert rows.shape == (0, 16) and place.shape == (0,) and ends.tolist() == [0] * 8
    assert npu.permute_backward(rows, place, 2).shape == npu.unpermute(rows, place, torch.zeros(0, 2)).shape == (0, 16)
    assert [x.shape for x in npu.weigh(rows, rows, torch.zeros(0, 1))] == [(0,), (0, 16)]
    assert npu.sorted_rows(rows, torch.zeros(0, 2, dtype=torch.long), place).shape == (0, 16)
    assert npu.grouped_matmul(rows, torch.randn(8, 16, 12), ends).shape == (0, 12)
    assert not npu.grouped_weight_grad(rows, torch.randn(0, 12), ends).any()
    assert npu.swiglu(torch.randn(0, 12)).shape == (0, 6) and npu.swiglu_backward(rows[:, :6], rows[:, :12]).shape == (
        0,
        12,
    )


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 63])
@pytest.mark.parametrize("adapted", ["", "gate_up", "down", "gate_up, down"])
def test_moe_experts(tokens, adapted, dtype, tolerance):
    """With adapters the weights are frozen."""
    ids, weights = choices(tokens), torch.rand(tokens, 2)
    pairs = {"gate_up": [(8, 4, 16), (8, 48, 4)], "down": [(8, 4, 24), (8, 16, 4)]}
    stacks = [torch.randn(shape) for name in pairs if name in adapted for shape in pairs[name]]
    inputs = [torch.randn(tokens, 16), weights, torch.randn(8, 48, 16), torch.randn(8, 16, 24), *stacks]
    ours = [t.to(dtype).requires_grad_(not adapted or i not in (2, 3)) for i, t in enumerate(inputs)]
    exact = [t.detach().double().requires_grad_() for t in ours]

    def run(module, x, weights, gate_up, down, *stacks):
        left = iter(stacks)
        given = {name: (next(left), next(left)) for name in pairs if name in adapted}
        return module.moe_experts(x, ids, weights, gate_up, down, adapters=ExpertAdapters(1.7, **given))

    y, z = run(fused, *ours), run(reference, *exact)
    z = z if tokens else torch.zeros(0, 16, dtype=torch.float64)
    probe = strided(y)
    y.backward(probe)
    assert y.dtype == dtype and error(y, z) <= tolerance
    if tokens:
        z.backward(probe.double())
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        if not a.requires_grad:
            assert a.grad is None
            continue
        assert a.grad.dtype == dtype and a.grad.shape == a.shape
        assert not tokens or error(a.grad, b.grad) <= tolerance, i
        assert i < 2 or not a.grad[[3, 6]].any(), i


@pytest.mark.parametrize("chunk", [1 << 27, 1], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("told", [False, True], ids=["", "told what is trained"])
def test_linear_cross_entropy(chunk, told, monkeypatch):
    monkeypatch.setattr(kernels.cross_entropy, "CHUNK_LOGITS", chunk)
    labels = torch.randint(0, 50, (100,))
    labels[::3] = -100
    weights = torch.rand(100)  # also for tokens without labels, which must not count
    mine = [torch.randn(100, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in mine]
    trained = (labels >= 0).nonzero()[:, 0] if told else None
    loss, token_loss = fused.linear_cross_entropy(*mine, labels, weights, trained)
    truth, token_truth = reference.linear_cross_entropy(*exact, labels, weights.double())
    (loss * 3).backward()
    (truth * 3).backward()
    assert loss.dtype == torch.float32 and not token_loss.requires_grad
    assert error(loss, truth) <= 1e-6 and error(token_loss, token_truth) <= 1e-6
    for a, b in zip(mine, exact, strict=True):
        assert error(a.grad, b.grad) <= 1e-6


@pytest.mark.parametrize("chunk", [1 << 27, 1], ids=["one chunk", "many chunks"])
def test_token_log_probs(chunk, monkeypatch):
    monkeypatch.setattr(kernels.cross_entropy, "CHUNK_LOGITS", chunk)
    labels = torch.randint(0, 50, (100,))
    labels[::3] = -100
    mine = [torch.randn(100, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in mine]
    grad = torch.randn(100)
    for rows in (None, (labels >= 0).nonzero()[:, 0]):
        ours, truth = fused.token_log_probs(*mine, labels, rows), reference.token_log_probs(*exact, labels)
        assert ours.dtype == torch.float32 and error(ours, truth) <= 1e-6
        pairs = zip(torch.autograd.grad(ours, mine, grad), torch.autograd.grad(truth, exact, grad), strict=True)
        assert all(error(a, b) <= 1e-6 for a, b in pairs)


def test_linear_cross_entropy_where_only_one_side_is_trained():
    labels, weights = torch.randint(0, 50, (20,)), torch.ones(20)
    for trained in (0, 1):
        leaves = [torch.randn(20, 16), torch.randn(50, 16)]
        leaves[trained].requires_grad_()
        fused.linear_cross_entropy(*leaves, labels, weights)[0].backward()
        assert leaves[trained].grad.any() and leaves[1 - trained].grad is None
    with torch.no_grad():
        assert fused.linear_cross_entropy(torch.randn(0, 16), torch.randn(50, 16), labels[:0], weights[:0])[0] == 0


def test_linear_cross_entropy_in_bf16_stays_near_fp32():
    labels = torch.randint(0, 300, (64,))
    mine = [torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(300, 32).bfloat16().requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in mine]
    loss, _ = fused.linear_cross_entropy(*mine, labels, torch.ones(64) / 64)
    truth, _ = reference.linear_cross_entropy(*exact, labels, torch.ones(64) / 64)
    loss.backward()
    truth.backward()
    assert error(loss, truth) <= 5e-3
    for a, b in zip(mine, exact, strict=True):
        assert a.grad.dtype == torch.bfloat16 and error(a.grad, b.grad) <= 2e-2


def test_arguments_passed_to_fla(monkeypatch):
    """fla's kernels need a device: it gets one batch, lengths in both forms, l2 norms inside."""
    given = []

    def stand_in(*args, **kwargs):
        given.append((args, kwargs))
        return args[2] if len(args) == 5 else args[0], None

    import sys

    modules = {
        "fla": SimpleNamespace(),
        "fla.modules": SimpleNamespace(),
        "fla.ops": SimpleNamespace(),
        "fla.modules.causal_conv1d": SimpleNamespace(causal_conv1d=stand_in),
        "fla.ops.gated_delta_rule": SimpleNamespace(chunk_gated_delta_rule=stand_in),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    chosen = kernels.select("npu", dict.fromkeys(kernels.FLA_OPS, "fla"))
    monkeypatch.delitem(sys.modules, "kernels.fla")  # for later imports
    q, k, v, g, beta = (
        torch.randn(9, 2, 8),
        torch.randn(9, 2, 8),
        torch.randn(9, 4, 8),
        -torch.rand(9, 4),
        torch.rand(9, 4),
    )
    assert torch.equal(chosen.chunk_gated_delta_rule(q, k, v, g, beta, cu([4, 0, 5])), v)
    (args, kwargs), x = given.pop(), torch.randn(9, 6)
    assert [tuple(a.shape) for a in args] == [(1, 9, 2, 8), (1, 9, 2, 8), (1, 9, 4, 8), (1, 9, 4), (1, 9, 4)]
    assert kwargs.pop("use_qk_l2norm_in_kernel") is True
    assert {n: t.tolist() for n, t in kwargs.items()} == {"cu_seqlens": [0, 4, 9], "cu_seqlens_cpu": [0, 4, 9]}
    assert torch.equal(chosen.causal_conv1d(x, torch.randn(6, 4), cu([9])), x)
    (args, kwargs) = given.pop()
    assert args[0].shape == (1, 9, 6) and args[1].shape == (6, 4) and kwargs["activation"] == "silu"
