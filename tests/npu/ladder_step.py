"""Rung 4, the whole step on fake NPU tensors: model, loss, backward, AdamW."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from steps import DEVICE, PEER_GROUPS_EXPERTS, Step, bytes_kept, make_batch, our_step, peer_step, slice_config
from table import layers, lines, measure, publish
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from watch import SavedBytes, Watch

import kernels
from kernels.triton import chunks
from kernels.triton.tiles import CONV_ROWS, Tiles
from qwen35.config.schema import ParallelSettings
from qwen35.device import DETERMINISTIC_ENV, enable_determinism
from qwen35.parallel.mesh import make_meshes
from rehearse.operators import has_kernel

LAYERS = ["linear_attention"] * 2 + ["full_attention"]
FORWARD = [
    "causal_conv1d::forward",
    "rms_norm_gated::forward",
    *(f"delta_rule::{x}" for x in ("prepare", "invert", "scan")),
]
ATTENTION = ["npu::npu_fusion_attention", "npu::npu_fusion_attention_grad"]
BACKWARD = ["causal_conv1d::backward", "rms_norm_gated::backward"]
BACKWARD += [f"delta_rule::{x}" for x in ("states", "grad_states", "gradients", "finish")]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Off: it would add an operator per new tensor."""


@cache
def step_of(moe: bool, images: bool, recompute: bool | str = False, mtp: bool = False) -> Step:
    config = slice_config(moe, LAYERS)
    return our_step(config, make_batch(config, 1024, images), recompute, mtp)


@pytest.mark.parametrize("recompute", [False, True, "selective"], ids=["", "recompute", "selective"])
@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
def test_a_step(moe, images, recompute):
    """No sync, no other device, no operator without a kernel; every parameter gets a gradient."""
    step = step_of(moe, images, recompute)
    assert not step.wrong
    called = {func.name().partition("::")[2] for func, _, _ in step.calls}
    wanted = {
        "npu_gemma_rms_norm",
        "npu_rotary_mul",
        "npu_fusion_attention",
        "npu_cross_entropy_loss",
        "npu_swiglu",
    }
    wanted |= {"npu_rms_norm_backward", "npu_fusion_attention_grad", "npu_swiglu_backward"}
    if moe:
        wanted |= {"npu_moe_token_permute", "npu_grouped_matmul", "npu_moe_token_permute_grad"}
    assert wanted <= called
    # the delta net's kernels run once per layer, in forward again if recomputed; selective skips
    # the scan, whose output is saved, and the attention of the text
    deltas = LAYERS.count("linear_attention")
    again = [deltas * bool(recompute)] * (len(FORWARD) - 1) + [deltas * (recompute is True)]
    assert [step.forward.ops[name] for name in FORWARD] == [deltas] * len(FORWARD)
    assert [step.backward.ops[name] for name in FORWARD] == again
    assert [step.backward.ops[name] for name in BACKWARD] == [deltas] * len(BACKWARD)
    attentions = {name: sum(func.name() == name for func, _, _ in step.calls) for name in ATTENTION}
    text, vision = LAYERS.count("full_attention"), slice_config(moe, LAYERS)["vision_config"]["depth"]
    more = vision * bool(recompute) + text * (recompute is True)
    assert list(attentions.values()) == [text + vision + more, text + vision]
    # no row of a gradient to which many tokens add, and no matmul for each patch, as of an einsum
    assert not [name for name in step.forward.ops | step.backward.ops if "index_put" in name or "bmm" in name]
    # the shapes of the operators do not depend on the data
    assert step.optimizer.ops["aten::_fused_adamw_"] > 0
    # the tower's parameters are restored by a mask, in two calls: matrices, all others
    assert step.optimizer.ops["aten::where.self"] == step.optimizer.ops["aten::_foreach_copy_"] == 1


@pytest.mark.parametrize(("moe", "recompute"), [(True, True), (False, False)], ids=["moe-recompute", "dense"])
def test_a_step_with_multi_token_prediction(moe, recompute):
    """One more attention layer, and more rows of the same head: no sync either."""
    plain, step = (step_of(moe, True, recompute, mtp) for mtp in (False, True))
    assert not step.wrong
    attention, head = "npu::npu_fusion_attention", "npu::npu_cross_entropy_loss"
    assert step.forward.ops[attention] == plain.forward.ops[attention] + 1
    assert step.forward.ops[head] >= plain.forward.ops[head] > 0


@pytest.fixture
def sharing():
    """Two ranks that share packed sequences, of which only this one exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield make_meshes("npu", ParallelSettings(ulysses_parallel_size=2))
    dist.destroy_process_group()


@pytest.mark.parametrize(("moe", "recompute"), [(True, True), (False, False)], ids=["moe-recompute", "dense"])
def test_a_step_with_context_parallelism(moe, recompute, sharing):
    """The exchanges do not sync, and the number of the mixers' operators does not change."""
    config = slice_config(moe, LAYERS)
    batch = make_batch(config, 1024, True)
    plain, step = step_of(moe, True, recompute, True), our_step(config, batch, recompute, True, sharing)
    assert not step.wrong
    for name in ("npu::npu_fusion_attention", *FORWARD):
        assert step.forward.ops[name] == plain.forward.ops[name] > 0, name
    mixers, exchange = len(LAYERS) + 1 + config["vision_config"]["depth"], "c10d::alltoall_base_"
    assert step.forward.ops[exchange] == 2 * mixers
    assert step.backward.ops[exchange] == 2 * mixers * (1 + recompute) + 1  # and the features' gradient
    assert step.forward.ops["c10d::allgather_"] == 1 and step.forward.ops["c10d::allreduce_"] == moe


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_chunk_tables_are_made_once_per_batch(recompute, monkeypatch):
    """Once for each of the two chunk sizes, not per layer or recomputation."""
    tables, make = [], chunks._made
    monkeypatch.setattr(
        chunks, "_made", lambda lengths, size, device: tables.append(size) or make(lengths, size, device)
    )
    config = slice_config(True, LAYERS)
    our_step(config, make_batch(config, 1024, True), recompute)
    assert sorted(tables) == [Tiles.of(128, 128).chunk, CONV_ROWS]


def test_text_and_images_dispatch_the_same():
    """The vision tower runs in every step, with the same operators: ranks cannot diverge."""
    one, two = (step_of(True, images) for images in (False, True))
    assert one.forward.ops == two.forward.ops and one.backward.ops == two.backward.ops


@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
def test_a_deterministic_step_has_the_same_operators(moe, monkeypatch):
    """training.deterministic adds no operator: its cost is inside CANN's operators."""
    for name, values in DETERMINISTIC_ENV.items():
        monkeypatch.setenv(name, values[0])
    config = slice_config(moe, LAYERS)
    batch = make_batch(config, 1024, True)
    plain = our_step(config, batch, "selective", True)
    enable_determinism()
    try:
        step = our_step(config, batch, "selective", True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not step.wrong
    for part in ("forward", "backward", "optimizer"):
        assert getattr(step, part).ops == getattr(plain, part).ops, part


def test_a_layer_against_transformers():
    """Upper bounds on measured counts; the figures are published."""
    if not PEER_GROUPS_EXPERTS:
        with pytest.raises(DataDependentOutputException):
            layers(peer_step, True)
    measured = measure()
    publish("1-layers.md", lines(measured))
    for moe in (True, False) if PEER_GROUPS_EXPERTS else (False,):
        ours, theirs = measured[moe, "ours"], measured[moe, "transformers"]
        gdn, attention = "linear_attention", "full_attention"
        for kind, of_ops, of_bytes in ((gdn, 0.12, 0.25), (attention, 0.65, 0.65)):
            launched, saved = sum(ours[kind].launched), ours[kind].saved
            assert 0 < launched <= of_ops * sum(theirs[kind].launched), (moe, kind, launched)
            assert 0 < saved <= of_bytes * theirs[kind].saved, (moe, kind, saved)


# ── That all of this can fail ─────────────────────────────────────────────────────────────────────


def test_the_watch_detects_forbidden_operators():
    with FakeTensorMode(), Watch() as watch:
        x = torch.ones(4, 4, device=DEVICE)
        x.add(1).view(16)
        assert not watch.record.wrong and watch.record.ops.total() == 3 and watch.record.launched == 2
        x.cpu()
        x[torch.tensor([0, 1])]
        x.copy_(torch.ones(4, 4), non_blocking=True)  # to the device: allowed
        x.copy_(torch.ones(4, 4))  # not allowed: torch_npu waits for the stream before it copies
        torch.empty(2).copy_(x[0, :2])
    found = "; ".join(watch.record.wrong)
    assert len(watch.record.wrong) == 4
    assert "aten::_to_copy copies [4, 4] to the host" in found and "aten::index.Tensor mixes npu with {'cpu'}" in found
    assert "aten::copy_ copies [2] to the host" in found
    assert not has_kernel(torch.ops.aten._cudnn_rnn.default) and has_kernel(torch.ops.aten.add.Tensor)
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones((), device=DEVICE).item()


def test_the_watch_detects_operators_without_a_kernel_on_the_cores():
    with FakeTensorMode(), Watch() as watch:
        x, ids = torch.ones(8, device=DEVICE), torch.arange(8, device=DEVICE)
        x.cumsum(0), ids.int().cumsum(0, dtype=torch.int32), x.sort(), x.sort(stable=True)
        torch.zeros(8, 8, device=DEVICE).scatter_(1, ids[:, None], 1.0)
        assert not watch.record.wrong
        (
            ids.cumsum(0),
            ids.sort(),
            ids.int().sort(stable=True),
            x.clone().scatter_(0, ids, x),
            x.clone().scatter_add_(0, ids, x),
        )
    found = "; ".join(watch.record.wrong)
    assert len(watch.record.wrong) == 5, found
    assert "aten::cumsum: of torch.int64" in found and found.count("aten::sort") == 2
    assert found.count("of one axis writes 8 values") == 2


def test_the_native_loss_would_sync():
    with FakeTensorMode():
        hidden, weight = torch.ones(9, 4, device=DEVICE), torch.ones(20, 4, device=DEVICE)
        labels = torch.zeros(9, dtype=torch.long, device=DEVICE)
        with pytest.raises(DynamicOutputShapeException):
            kernels.linear_cross_entropy(hidden, weight, labels, labels.float())


@pytest.mark.parametrize(
    ("kind", "core"), [("linear_attention", 2 * 32 * 128), ("full_attention", 2 * 8 * 256 + 2 * 4 * 8 * 8)]
)  # bytes of a core's outputs: bf16, and fp32 max and sum of each head's softmax, eight times each
def test_bytes_saved_per_layer(kind, core):
    """Per token at the end of forward: the layer's input, and with selective its core's output."""
    tokens, base = 1024, ("linear_attention", "full_attention")
    kept = {}
    for how in (False, True, "selective"):
        more, less = (kept_by(types, tokens, how) for types in (tuple(sorted([*base, kind], reverse=True)), base))
        kept[how] = (more - less) / tokens
    small = 2  # slack for what does not depend on the tokens
    assert 2 * 1024 <= kept[True] <= 2 * 1024 + small
    assert 2 * 1024 + core <= kept["selective"] <= 2 * 1024 + core + small
    assert kept[False] > 3 * kept["selective"]


@cache
def kept_by(types: tuple[str, ...], tokens: int, how: bool | str) -> int:
    config = slice_config(True, list(types))
    return bytes_kept(config, make_batch(config, tokens, False), how)


def test_saved_bytes_are_counted_once():
    weight, x = torch.ones(8, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    kept = SavedBytes([weight])
    with kept:
        y = (x @ weight).exp()  # saves x, the weight (not counted) and its result
        (y.view(-1) * y.view(-1)).sum()  # the same result again
    assert kept.total == 2 * 4 * 8 * 4
