"""Rung 5, numbers: the Triton kernels in triton-ascend's own interpreter, on CPU tensors, against
kernels/reference.py, forward and every gradient, on the native ops' own grid of lengths. In bf16 no
further from it than twice the native op.
"""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import interpreter
import pytest
import torch
import triton_cost
from gate_gradients import CASES, compare_with_transformers
from table import publish
from test_kernels import LENGTHS as NATIVE
from test_kernels import cu
from triton.backends.ascend.driver import NPUDriver

import kernels
from kernels import reference
from kernels import triton as ours
from kernels.recompute_cache import RecomputeCache
from kernels.triton import tiles

interpreter.install()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# those of the native ops, but for the longest and the most sequences, since the interpreter is slow
LENGTHS = [*(some for some in NATIVE if len(some) < 50 and sum(some) < 1000), [330], [1, 2, 3, 2, 2] * 13]
SHORT = [[1], [65], [1, 1, 64, 3, 130, 1]]  # in bf16, where loads and stores round and the indices are the same
ROUNDING = 2.0**-9  # the error of rounding the exact answer to bf16


def on_lengths(lengths: list[list[int]]) -> pytest.MarkDecorator:
    cases = [*((some, torch.float32) for some in lengths), *((some, torch.bfloat16) for some in SHORT)]
    names = [f"{some[:6]}-{str(dtype).removeprefix('torch.')}" for some, dtype in cases]
    return pytest.mark.parametrize(("lengths", "dtype"), cases, ids=names)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error; absolute for gradients that are exactly zero."""
    return float((x.double() - exact).norm() / exact.norm().clamp(min=1e-2))


def run(op, inputs: list, rest: tuple, dtype: torch.dtype, probe: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.to(dtype).detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, probe.to(out.dtype))]


def compare(op: str, inputs: list, *rest, dtype=torch.float32, **tile) -> None:
    """Few numbers may be rounded to bf16 luckily: of few tokens errors are over several draws."""
    own = partial(getattr(ours, op), **tile)
    draws = []
    for _ in range(8 if len(inputs[0]) < 5 and dtype == torch.bfloat16 else 1):
        probe = torch.randn(inputs[2 if op == "chunk_gated_delta_rule" else 0].shape).to(dtype)
        rounded = [x.to(dtype) for x in inputs]
        args = rounded, rest
        exact = run(getattr(reference, op), *args, torch.float64, probe)
        draws.append((run(own, *args, dtype, probe), run(getattr(kernels, op), *args, dtype, probe), exact))
        inputs = [x if len(x) != len(inputs[0]) else x[..., torch.randperm(x.shape[-1])] for x in inputs]
    for i in range(len(draws[0][0])):
        found, native, exact = (torch.cat([draw[which][i] for draw in draws]) for which in range(3))
        assert found.dtype == dtype and found.shape == exact.shape
        allowed = max(2 * error(native, exact), 2e-5 if dtype == torch.float32 else ROUNDING)
        off = error(found, exact)
        assert off <= allowed, f"{op} {i}: {off:.1e}, the native one {error(native, exact):.1e}"


@DTYPES
def test_recomputation_reuses_the_output(dtype, monkeypatch):
    """In a recomputed layer gradients are bit-equal and there is only one scan."""
    scans, scan = [], ours.delta_rule.launch.scan
    monkeypatch.setattr(ours.delta_rule.launch, "scan", lambda *args: scans.append(1) or scan(*args))
    inputs, probe = [x.to(dtype) for x in delta_rule(70)], torch.randn(70, 6, 32)
    plain = run(ours.chunk_gated_delta_rule, inputs, (cu([3, 67]),), dtype, probe)
    recompute_cache = RecomputeCache(keeps_outputs=True)
    first, second = recompute_cache.contexts()
    with first:
        ours.chunk_gated_delta_rule(*inputs, cu([3, 67]), recompute_cache)
    with second:
        again = run(ours.chunk_gated_delta_rule, inputs, (cu([3, 67]), recompute_cache), dtype, probe)
    assert len(scans) == 2 and all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def delta_rule(T: int, Hk: int = 2, Hv: int = 6, Dk: int = 16, Dv: int = 32) -> list[torch.Tensor]:
    return [
        torch.randn(T, Hk, Dk),
        torch.randn(T, Hk, Dk),
        torch.randn(T, Hv, Dv),
        -torch.rand(T, Hv),
        torch.rand(T, Hv),
    ]


@on_lengths([*LENGTHS, [0, 65, 0]])
def test_gated_delta_rule(lengths, dtype):
    heads = (1, 1) if len(lengths) > 50 else (1, 2) if sum(lengths) > 300 else (2, 6)  # the interpreter is slow
    compare("chunk_gated_delta_rule", delta_rule(sum(lengths), *heads), cu(lengths), dtype=dtype)


@pytest.mark.parametrize(
    "heads",
    [(1, 1, 64, 64), (1, 2, 64, 128), (2, 2, 128, 64), (1, 3, 128, 128), (1, 1, 256, 256), (3, 9, 32, 16)],
    ids=str,
)
def test_gated_delta_rule_of_other_heads(heads):
    lengths = [3, 66, 1]
    compare("chunk_gated_delta_rule", delta_rule(70, *heads), cu(lengths), dtype=torch.bfloat16)


@DTYPES
@pytest.mark.parametrize("gate", [0.0, -1e-6, -60.0], ids=["open", "nearly open", "closed"])
@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["beta 0", "beta 1"])
@pytest.mark.parametrize("alike", [False, True], ids=["", "keys alike"])
def test_gated_delta_rule_at_the_ends_of_its_gates(gate, rate, alike, dtype):
    """Equal keys make the system of a chunk as ill-conditioned as possible."""
    q, k, v, _, _ = delta_rule(66, 1, 1)
    k = 1 + 0.01 * k if alike else k
    inputs = [q, k, v, torch.full((66, 1), gate), torch.full((66, 1), rate)]
    compare("chunk_gated_delta_rule", inputs, cu([1, 65]), dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_gates_beside_transformers(case):
    """Those of A_log and dt_bias, at most twice its error, as for the native path."""
    triton = kernels.Kernels(**{op: getattr(ours, op) for op in kernels.TRITON_OPS})
    compare_with_transformers(triton, case, [96], seeds=3)


@pytest.mark.parametrize("op", [ours.chunk_gated_delta_rule, kernels.chunk_gated_delta_rule], ids=["triton", "native"])
def test_gradients_of_shut_gates_beside_open_ones(op):
    """They are e^-15 of those of the open gates of their chunk, and each is right all the same."""
    inputs, lengths = delta_rule(173), [100, 3, 70]
    gates = inputs[3]
    gates -= 15
    gates[[64, 167]] = -0.1  # each a chunk's first, which read most of its entering state
    probe, shut = torch.randn(173, 6, 32), gates < -1
    found, exact = (
        run(some, inputs, (cu(lengths),), dtype, probe)[4][shut]
        for some, dtype in ((op, torch.float32), (reference.chunk_gated_delta_rule, torch.float64))
    )
    off = (found - exact).abs()
    assert off.norm() <= 1e-4 * exact.norm() and (off <= 1e-2 * exact.abs()).all()


@on_lengths([*LENGTHS, [0, 5, 0, 5, 5, 0]])
def test_causal_conv1d(lengths, dtype):
    compare("causal_conv1d", [torch.randn(sum(lengths), 10), torch.randn(10, 4)], cu(lengths), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000, 5000])
def test_rms_norm_gated(rows, dtype):
    compare("rms_norm_gated", [torch.randn(rows, 32), torch.randn(rows, 32), torch.randn(32)], 1e-6, dtype=dtype)
    compare("rms_norm_gated", [torch.randn(rows, 2, 24), torch.randn(rows, 2, 24), torch.randn(24)], 1e-6, dtype=dtype)


def test_more_tasks_than_programs(monkeypatch):
    """A launch has one program per core, each of which loops over tasks."""
    monkeypatch.setattr(tiles, "CUBE_CORES", 3)
    monkeypatch.setattr(tiles, "VECTOR_CORES", 2)
    lengths = [70, 1, 5, 150]
    compare("chunk_gated_delta_rule", delta_rule(226), cu(lengths), dtype=torch.float32)
    compare("causal_conv1d", [torch.randn(226, 10), torch.randn(10, 4)], cu(lengths), dtype=torch.float32)
    compare("rms_norm_gated", [torch.randn(900, 32), torch.randn(900, 32), torch.randn(32)], 1e-6, dtype=torch.float32)


class StandInDriver(NPUDriver):
    """triton-ascend's driver without its queries to the device."""

    def __init__(self) -> None:
        properties = {"num_aicore": 21, "num_vectorcore": 40}
        self.utils = SimpleNamespace(get_device_properties=lambda index: properties)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """A fake torch_npu's ways to get the stream; `drains` empties its queue first."""
    asked: list[str] = []
    c = ModuleType("torch_npu._C")
    c._npu_getCurrentRawStream = lambda device: asked.append("drains") or 7
    c._npu_getCurrentRawStreamNoWait = lambda device: asked.append("does not") or 7
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(_C=c))
    monkeypatch.setitem(sys.modules, "torch_npu._C", c)
    monkeypatch.setattr(tiles, "driver", SimpleNamespace(active=StandInDriver()))
    tiles._driver.cache_clear()
    yield asked
    tiles._driver.cache_clear()


@pytest.mark.parametrize("how", ["drains", "does not", "TRITON_ENABLE_TASKQUEUE"])
def test_the_queue_is_not_drained_where_torch_npu_can(asked, how, monkeypatch):
    """2.7.1.post2 lacks the function; it must not be used if launches bypass the queue."""
    if how == "drains":
        del sys.modules["torch_npu._C"]._npu_getCurrentRawStreamNoWait
    if how == "TRITON_ENABLE_TASKQUEUE":
        monkeypatch.setenv(how, "false")
    for _ in range(3):  # launches, each of which counts its programs and gets the stream
        tiles.programs(7, SimpleNamespace(type="npu", index=1))
        assert tiles.driver.active.get_current_stream(1) == 7
    assert asked == ["does not" if how == "does not" else "drains"] * 3


def test_programs_are_as_many_as_the_cores_there(asked):
    device = SimpleNamespace(type="npu", index=1)
    assert tiles.programs(1000, device, products=True) == 21 and tiles.programs(1000, device) == 40
    assert tiles.programs(7, device) == 7 and tiles.programs(0, device) == 1
    assert tiles.programs(100_000, SimpleNamespace(type="cuda", index=0)) == 65_535  # which a GPU schedules itself


def test_select_prefers_the_triton_kernels():
    for device, choices in (("npu", {}), ("cuda", dict.fromkeys(kernels.TRITON_OPS, "triton"))):
        chosen = kernels.select(device, choices)
        assert all(getattr(chosen, op) is getattr(ours, op) for op in kernels.TRITON_OPS)
    assert (
        kernels.select("npu", {"gated_delta_rule": "native"}).chunk_gated_delta_rule is kernels.chunk_gated_delta_rule
    )
    assert kernels.select("cuda") == kernels.Kernels()


def test_more_channels_than_a_program_takes():
    compare("causal_conv1d", [torch.randn(70, 10), torch.randn(10, 4)], cu([3, 67]), channels=4)


@DTYPES
@pytest.mark.parametrize(("chunk", "columns"), [(64, 16), (32, 32), (16, 16)])
def test_smaller_tiles(chunk, columns, dtype):
    """Smaller tiles, for kernels that do not fit, are as close to the reference."""
    fallen = {"tiles": tiles.Tiles(chunk, columns)}
    compare("chunk_gated_delta_rule", delta_rule(70), cu([3, 67]), dtype=dtype, **fallen)
    wide = [torch.randn(70, 2, 24), torch.randn(70, 2, 24), torch.randn(24)]
    compare("rms_norm_gated", wide, 1e-6, dtype=dtype, elements=64)


def test_tiles_get_smaller_until_there_are_none():
    """Per kernel: scans take fewer columns first, then, like the others, a smaller chunk."""
    start = tiles.Tiles.of(128, 128)
    falls = {
        "delta_rule::gradients": 2,
        "delta_rule::scan": 3 + 2,
        "causal_conv1d::backward": 4,
        "rms_norm_gated::forward": 4,
    }
    for kernel, count in falls.items():
        found, now = [], start
        while now := now.smaller(kernel):
            found.append(now)
        assert len(found) == len(set(found)) == count, kernel
        assert all(tiles.Tiles.of(128, 128) != x and x.describe(kernel) != start.describe(kernel) for x in found)
    assert start.smaller("delta_rule::scan") == tiles.Tiles(64, 64) and found[-1].elements == 256


def test_slices_of_one_projection_are_read_where_they_are():
    lengths = [65, 5]
    packed = torch.randn(70, 2 * 2 * 16 + 4 * 16)
    inputs = [x.unflatten(1, (-1, 16)) for x in packed.split([32, 32, 64], dim=1)]
    g, beta = -torch.rand(70, 4), torch.rand(70, 4)
    out = ours.chunk_gated_delta_rule(*inputs, g, beta, cu(lengths))
    assert torch.equal(out, ours.chunk_gated_delta_rule(*(x.contiguous() for x in inputs), g, beta, cu(lengths)))
    from kernels.triton.delta_rule import _contiguous_heads

    assert all(_contiguous_heads(x) is x for x in inputs)


@pytest.mark.parametrize("op", ["chunk_gated_delta_rule", "causal_conv1d"])
def test_neighbours_do_not_matter(op):
    """A sequence's outputs and gradients are the same alone and among sequences of NaN."""
    lengths, T = [70, 1, 5, 64], 140
    tensors = delta_rule(T, 1, 2) if op == "chunk_gated_delta_rule" else [torch.randn(T, 6)]
    rest = () if op == "chunk_gated_delta_rule" else (torch.randn(6, 4),)
    probe = torch.randn(tensors[2 if op == "chunk_gated_delta_rule" else 0].shape)

    def results(some, lengths, probe):
        leaves = [x.clone().requires_grad_() for x in some]
        out = getattr(ours, op)(*leaves, *rest, cu(lengths))
        return out, *torch.autograd.grad(out, leaves, probe)

    start = 0
    for length in lengths:
        seq = slice(start, start + length)
        poisoned = [torch.full_like(x, float("nan")) for x in tensors]
        for x, y in zip(poisoned, tensors, strict=True):
            x[seq] = y[seq]
        alone = results([x[seq] for x in tensors], [length], probe[seq])
        for a, b in zip(alone, results(poisoned, lengths, probe), strict=True):
            assert (a - b[seq]).abs().max() <= 1e-5
        start += length


def test_fewer_bytes_and_launches_than_fla():
    """As counted, against fla-core's minimum; the figures are published."""
    found = triton_cost.cost(ours.chunk_gated_delta_rule)
    publish("3-bytes.md", triton_cost.lines(found))
    for direction, moved in found.items():
        launches, at_least = triton_cost.FLA[direction]
        each = (moved.read.total() + moved.written.total()) / (triton_cost.TOKENS * triton_cost.Hv)
        assert 0 < each < at_least / 2 and 3 <= moved.launches.total() <= launches / 4, direction


def test_without_tokens():
    nothing = cu([0, 0])
    assert ours.chunk_gated_delta_rule(*delta_rule(0), nothing).shape == (0, 6, 32)
    assert ours.causal_conv1d(torch.randn(0, 6), torch.randn(6, 4), nothing).shape == (0, 6)
    assert ours.rms_norm_gated(torch.randn(0, 2, 8), torch.randn(0, 2, 8), torch.randn(8), 1e-6).shape == (0, 2, 8)


def test_unsupported_sizes_raise():
    with pytest.raises(ValueError, match=r"heads of \(16, 32, 64, 128, 256\), not of 24; .*gated_delta_rule=native"):
        ours.chunk_gated_delta_rule(*delta_rule(5, 1, 1, 24, 16), cu([5]))
    with pytest.raises(ValueError, match=r"has 4 taps, the weight 3; .*causal_conv1d=native"):
        ours.causal_conv1d(torch.randn(5, 6), torch.randn(6, 3), cu([5]))
