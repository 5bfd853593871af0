"""Every op against kernels/reference.py: forward and all gradients, odd lengths, extreme gates, packed and separate."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import reference

LENGTHS = [[1], [2], [63], [64], [65], [127], [200], [1, 1, 64, 3, 130, 1]]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12))


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def compare(op: str, inputs: list, *rest, dtype=torch.float32, tolerance=2e-5) -> None:
    """Our op in `dtype` against the reference in fp64 on the same (rounded) inputs: outputs and the gradient of each input."""
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


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_causal_conv1d(lengths, dtype, tolerance):
    inputs = [torch.randn(sum(lengths), 10), torch.randn(10, 4)]
    compare("causal_conv1d", inputs, cu(lengths), dtype=dtype, tolerance=tolerance)


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)  # one token alone has a test of its own below
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
@pytest.mark.parametrize("tokens", [1, 63, 200])
def test_moe_experts(tokens, dtype, tolerance):
    ids = torch.rand(tokens, 6).topk(2).indices
    ids[ids == 3] = 7  # expert 3 idles, and so do 6 and all but one of the last two
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
    """Rows that are no multiple of 16 bytes: the grouped matmul refuses them."""
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
def test_norms_rotary_and_swiglu(dtype, tolerance):
    compare("rms_norm", [torch.randn(5, 7, 32), torch.randn(32)], 1e-6, dtype=dtype, tolerance=tolerance)
    inputs = [torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)]
    compare("rms_norm_gated", inputs, 1e-6, dtype=dtype, tolerance=tolerance)
    angle = torch.randn(9, 4)
    rotary = [torch.randn(9, 4, 32), torch.randn(9, 2, 32)]
    compare("apply_rotary", rotary, angle.cos(), angle.sin(), dtype=dtype, tolerance=tolerance)
    compare("swiglu", [torch.randn(9, 48)], dtype=dtype, tolerance=tolerance)


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


def test_linear_cross_entropy_never_holds_all_logits(monkeypatch):
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
    with Largest() as largest:
        kernels.linear_cross_entropy(hidden, weight, torch.randint(0, 1000, (256,)), torch.ones(256))[0].backward()
    assert largest.size == 16 * 1000  # of 256,000


def test_nothing_trained_gives_zero_loss_and_zero_gradients():
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss, _ = kernels.linear_cross_entropy(hidden, weight, torch.full((7,), -100), torch.zeros(7))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_gradients_in_fp64():
    T, bounds = 9, cu([4, 5])
    d = {"dtype": torch.float64, "requires_grad": True}
    q, k, v, b = torch.randn(T, 1, 3, **d), torch.randn(T, 1, 3, **d), torch.randn(T, 2, 2, **d), torch.rand(T, 2, **d)
    g = (-torch.rand(T, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: kernels.chunk_gated_delta_rule(*x, bounds), (q, k, v, g, b))
    x, w = torch.randn(T, 3, **d), torch.randn(3, 4, **d)
    assert torch.autograd.gradcheck(lambda *a: kernels.causal_conv1d(*a, bounds), (x, w))
    labels = torch.tensor([0, 1, -100, 2, 3, 4, 0, 1, 2])
    inputs = (torch.randn(T, 3, **d), torch.randn(5, 3, **d))
    scale = torch.rand(T, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: kernels.linear_cross_entropy(*a, labels, scale)[0], inputs)


# -- selection ----------------------------------------------------------------------------------------------------------


def test_select_has_no_quiet_fallback():
    assert kernels.select("cpu") == kernels.Kernels()
    with pytest.raises(kernels.KernelError, match="chunk_gated_delta_rule: no fused kernel for npu here"):
        kernels.select("npu")
    with pytest.raises(
        kernels.KernelError, match=r"moe_experts: .* torch_npu cannot be imported .* make install DEVICE=npu"
    ):
        kernels.select("npu", dict.fromkeys(kernels.BY_FLA, "native"))
    assert kernels.select("npu", dict.fromkeys(kernels.OPS, "native")) == kernels.Kernels()


def test_import_kernels_is_quick_and_free_of_torch_npu():
    code = "import sys, kernels; assert not {'torch_npu', 'fla', 'kernels.npu', 'kernels.fused'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"gated_delta_rul": "auto"}, "no op is named gated_delta_rul"),
        ({"swiglu": "fused"}, "'fused' is not one of auto, native"),
        ({"swiglu": "torch_npu"}, "'torch_npu' is not one of auto, native"),
    ],
)
def test_select_refuses_what_is_not_there(choices, words):
    with pytest.raises(kernels.KernelError, match=words):
        kernels.select("cpu", choices)


def test_the_table_prints_and_the_name_does_not_break_transformers():
    """transformers probes for a package named kernels, and from the root of the project it finds ours."""
    root = Path(__file__).parents[1]
    table = subprocess.run(
        [sys.executable, "-m", "kernels"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert all(op in table for op in kernels.OPS)
    code = "import kernels; assert kernels.__version__ == '0.0.0'; import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
