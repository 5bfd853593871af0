"""Context parallelism: ranks that share each micro-batch compute what one process computes."""

import dataclasses
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from forked import spawn
from peer import ONE_OF_EACH, PATCH_VALUES, config_dict, sample
from ports import free_port
from small_steps import BIN, BUCKET, fill_from, full, run_of, settings_of
from training_runs import tensors, train

from qwen35.config.schema import LossCfg
from qwen35.data.collator import collate
from qwen35.data.dataset import Sample
from qwen35.device import HOST, init_process
from qwen35.model import Qwen35, load_config
from qwen35.parallel import collectives
from qwen35.parallel.activation_offload import Offload
from qwen35.parallel.context_parallel import apply_context_parallel, shard_batch
from qwen35.parallel.fsdp import shard
from qwen35.parallel.mesh import make_meshes
from qwen35.rank import leave
from qwen35.train import train_step
from qwen35.training.loss import make_mtp_targets, token_weights
from qwen35.training.metrics import SUMS, read_metrics
from qwen35.training.optimizer import make_optimizer
from qwen35.training.parameter_groups import freeze

STEPS = 2


def make_config(heads: int = 4, **case) -> dict:
    """With heads for so many ranks, but only two KV heads of the attention."""
    config = config_dict(key_heads=heads, value_heads=2 * heads, num_attention_heads=heads, **ONE_OF_EACH, **case)
    config["vision_config"]["num_heads"] = heads
    return config


SPEC = load_config(make_config()).vision_spec


def make_bin(*parts: list, trained: bool = True, seed: int):
    """Packed sequences as the collator makes them, with pad tail and dummy image."""
    samples = [sample(some, seed=seed + i) for i, some in enumerate(parts)]
    fields = [f.name for f in dataclasses.fields(Sample) if f.default is dataclasses.MISSING]
    batch = collate([[Sample(*(getattr(s, f) for f in fields)) for s in samples]], BIN, 0, BUCKET, SPEC)
    if not trained:
        batch = dataclasses.replace(
            batch,
            labels=torch.full_like(batch.labels, -100),
            label_positions=batch.label_positions[:0],
            bad_records=("its image is broken",),
        )
    return batch


# parts end at 32 (and 16, 48): an image crosses the middle, sequences cross all of them
BATCHES = [
    make_bin([20, (8, 6), 6], [13], seed=0),
    make_bin([41], [20], seed=10),
    make_bin([3, (8, 4), 4], [2, (2, 4, 4), 9], [1], seed=20),
    make_bin([17], seed=30, trained=False),
]
LONG = [make_bin([30, (8, 6), 20], seed=40), make_bin([64], seed=50)]  # one sequence on all ranks
EIGHT = {"parallel": {"ulysses_parallel_size": 8}, "config": {"heads": 8}, "recompute": True, "mtp": 1, "batches": LONG}
CASES = {  # parallel settings and model settings
    "ulysses 2 x fsdp 2": {"parallel": {"ulysses_parallel_size": 2}, "mtp": 1},
    "ulysses 4": {
        "parallel": {"ulysses_parallel_size": 4},
        "mtp": 1,
        "recompute": True,
        "loss_type": "per_token_loss",
    },
    "ulysses 2 x 2 replicas": {
        "parallel": {"ulysses_parallel_size": 2, "fully_shard_parallel_size": 2},
        "freeze": ("model.visual", "model.language_model.layers.{*}.mlp.gate"),
        "loss_type": "per_sample_loss",
    },
    "ulysses 2 x ep 2": {
        "parallel": {"ulysses_parallel_size": 2, "expert_parallel_size": 2},
        "mtp": 1,
        "recompute": "selective",
    },
    "ulysses 4, dense and tied": {
        "parallel": {"ulysses_parallel_size": 4, "fully_shard_parallel_size": 2},
        "config": {"moe": False, "tied": True},
        "recompute": "selective",
        "mtp": 1,
    },
    "all at once": {
        "parallel": {"ulysses_parallel_size": 2, "expert_parallel_size": 2, "fully_shard_parallel_size": 2},
        "config": {"tied": True, "num_experts_per_tok": 3},
        "recompute": "selective",
        "mtp": 1,
        "loss_type": "per_token_loss",
        "on_host": True,  # activations and the optimizer's moments
    },
}


def some_steps(case: dict, is_shared: bool) -> dict:
    """train_step on this rank's BATCHES: sums over ranks, norms, first gradients, final weights."""
    config, mtp, loss_cfg = make_config(**case.get("config", {})), case.get("mtp", 0), case.get("loss_type", "default")
    settings = settings_of(
        {"mtp_num_layers": mtp, "mtp_loss_scaling_factor": 0.3, "loss_cfg": LossCfg(loss_cfg, 0.1)},
        case["parallel"] if is_shared else {},
        train_iters=STEPS,
        lr=1e-2,
        weight_decay=0.1,
        adam_eps=1e-4,
        clip_grad=0.05,
        optimizer="adamw_swap" if is_shared and case.get("on_host") else "adamw",
    )
    meshes = make_meshes(HOST.type, settings.parallel)
    whole = Qwen35.from_config(config, seed=1, mtp=bool(mtp))
    model = whole
    if is_shared:
        with torch.device("meta"):
            model = Qwen35(load_config(config), mtp=bool(mtp))
    freeze(model, list(case.get("freeze", ())))
    if is_shared:
        apply_context_parallel(model, meshes)
        shard(model, meshes, torch.float32)
        fill_from(model, whole)
    model.recompute(case.get("recompute", False))
    if is_shared and case.get("on_host"):
        model.model.language_model.offload = Offload(HOST, min_bytes=0).stash
    optimizer = make_optimizer(model, settings.training)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_) -> None:
        if not gradients:
            gradients.update((n, full(p.grad)) for n, p in model.named_parameters() if p.grad is not None)

    optimizer.register_step_pre_hook(keep)
    run = run_of(model, settings, meshes, optimizer)
    mine = case.get("batches", BATCHES)[meshes.data_rank :: meshes.data_size]
    records = [train_step(run, mine, 1e-2, 0.0) for _ in range(STEPS)]
    sums = torch.stack([torch.cat([r.sums, torch.tensor([r.flops, len(r.bad_records)])]) for r in records])
    dist.all_reduce(sums)
    return {
        "sums": sums,
        "norms": torch.stack([r.group_squares.sum().sqrt() for r in records]),
        "gradients": gradients,
        "weights": {n: full(p) for n, p in model.named_parameters()},
    }


# ── Four processes, and eight ─────────────────────────────────────────────────────────────────────


def worker(rank: int, ranks: int, cases: dict, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    init_process()
    results = {"exchanges": {str(dtype): exchanged(dtype) for dtype in (torch.float32, torch.bfloat16) if ranks == 4}}
    for name, case in cases.items():
        with counting() as counted:
            results[name] = some_steps(case, is_shared=True)
        results[name]["messages"] = counted
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()
    leave(0)


@contextmanager
def counting():
    """The number and bytes of each kind of message that context parallelism sends."""
    counted = {"count": Counter(), "bytes": Counter()}

    class Counting:
        def __getattr__(self, name):
            def call(*given, group):
                counted["count"][name] += 1
                counted["bytes"][name] += given[-1].numel() * given[-1].element_size()
                return getattr(dist, name)(*given, group=group)

            return call

    with mock.patch.object(collectives, "dist", Counting()):
        yield counted


def exchanged(dtype: torch.dtype) -> dict[str, bool]:
    """Heads, tokens and gradients arrive at the right ranks; two dtypes travel in one message."""
    rank, U, T = dist.get_rank(), 4, 12
    generator = torch.Generator().manual_seed(3)
    q, k, x = (torch.randn(T, *shape, generator=generator).to(dtype) for shape in ((8, 6), (4, 10), (4, 3)))
    g = torch.randn(T, 8, generator=generator)
    here = slice(rank * T // U, (rank + 1) * T // U)
    mine = [t[here].clone().requires_grad_() for t in (q, k, g)]
    both, of_g = collectives.to_heads(dist.group.WORLD, mine[:2], mine[2:])
    q_heads, k_heads, g_heads = (t.chunk(U, dim=1)[rank] for t in (q, k, g))
    one = torch.equal(both, torch.cat([q_heads.flatten(1), k_heads.flatten(1)], dim=1)) and torch.equal(of_g, g_heads)
    ((both * both).sum() + (of_g * of_g).sum()).backward()
    two = all(torch.equal(t.grad, 2 * whole[here]) for t, whole in zip(mine, (q, k, g), strict=True))
    heads = x.chunk(U, dim=1)[rank].clone().requires_grad_()
    back = collectives.to_tokens(dist.group.WORLD, heads)
    (back * back).sum().backward()
    three = torch.equal(back, x[here]) and torch.equal(heads.grad, 2 * heads)
    return {"to heads": one and both.dtype == dtype and of_g.dtype == g.dtype, "backward": two, "to tokens": three}


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("ulysses") / "results.pt"
    spawn(worker, 4, CASES, free_port(), out, ranks=4)
    return torch.load(out, weights_only=False)


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_four_processes_equal_one(four, alone, name):
    case = CASES[name]
    one, found = some_steps(case, is_shared=False), four[name]
    check_equal(found, one)
    names = (*SUMS, *("mtp_loss",) * case.get("mtp", 0), "flops", "bad_records")
    sums = dict(zip(names, one["sums"][0].tolist(), strict=True))
    assert sums["bad_records"] == 1 and sums["image_tokens"] == 12 + 8 + 8 and sums["tokens"] == 53 + 61 + 41 + 17
    is_frozen = bool(case.get("freeze"))
    assert any("visual" in n for n in one["gradients"]) != is_frozen
    assert len(one["gradients"]) == len(one["weights"]) - is_frozen * sum(
        "visual" in n or n.endswith("mlp.gate.weight") for n in one["weights"]
    )


def test_a_sequence_of_eight_processes_equals_one(alone, tmp_path):
    spawn(worker, 8, {"eight": EIGHT}, free_port(), tmp_path / "results.pt", ranks=8)
    one, found = some_steps(EIGHT, is_shared=False), torch.load(tmp_path / "results.pt", weights_only=False)["eight"]
    assert [batch.cu_seqlens.tolist() for batch in LONG] == [[0, BIN]] * 2
    check_equal(found, one)
    assert len(found["gradients"]) == len(found["weights"])


def check_equal(found: dict, one: dict) -> None:
    torch.testing.assert_close(found["sums"], one["sums"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["norms"], one["norms"], rtol=1e-5, atol=0)
    assert one["sums"][0, 0] > one["sums"][-1, 0] > 0 and one["norms"].min() > 0.05
    for kind in ("gradients", "weights"):
        assert one[kind].keys() == found[kind].keys()
        for parameter, value in one[kind].items():
            difference = (found[kind][parameter] - value).norm()
            assert difference <= 1e-5 * value.norm() + 1e-9, f"{kind} of {parameter}: {difference / value.norm():.1e}"


def test_exchanges_move_heads_and_tokens(four):
    assert all(all(found.values()) for found in four["exchanges"].values()), four["exchanges"]


@pytest.mark.parametrize("name", ["ulysses 2 x fsdp 2", "ulysses 4"])
def test_messages_of_each_kind_and_their_bytes(four, name):
    """Two per mixer forward, two backward (two more if recomputed), of the heads' bytes exactly."""
    case, T, P = CASES[name], BIN, [len(batch.pixel_values) for batch in BATCHES]
    U, recompute = case["parallel"]["ulysses_parallel_size"], bool(case.get("recompute"))
    steps = [STEPS] * len(BATCHES) if U == 4 else [STEPS, 0] * 2  # rank 0's micro-steps with each batch
    text, vision = make_config()["text_config"], make_config()["vision_config"]
    layers, blocks = len(text["layer_types"]) + 1, vision["depth"]  # including multi-token prediction
    found = four[name]["messages"]
    assert found["count"] == {
        "all_to_all_single": sum(steps) * ((4 + 2 * recompute) * (layers + blocks) + 1),
        "all_gather": sum(steps),
        "all_reduce": sum(steps),
    }
    keys, values = 4 * text["linear_key_head_dim"], 8 * text["linear_value_head_dim"]
    heads, D = text["num_attention_heads"], text["head_dim"]
    delta_net = (2 * keys + values + 2 * 8) + values
    attention = (heads + 2 * max(text["num_key_value_heads"], U)) * D + heads * D
    patches = sum(n * p for n, p in zip(steps, P, strict=True))
    numbers = sum(steps) * T // U * (delta_net + 2 * attention) + patches // U * blocks * 4 * vision["hidden_size"]
    features = patches // 4 * vision["out_hidden_size"]  # bytes of the features' gradients
    assert found["bytes"]["all_to_all_single"] == 4 * ((2 + recompute) * numbers + features)
    assert found["bytes"]["all_gather"] == 4 * features // U
    assert found["bytes"]["all_reduce"] == 4 * sum(steps) * 2 * text["num_experts"]


# ── A batch's parts ───────────────────────────────────────────────────────────────────────────────


def test_the_parts_make_the_whole_batch():
    batch = BATCHES[0]
    weights, mtp_targets = token_weights(batch, "default"), make_mtp_targets(batch, "default")
    parts = [shard_batch(batch, weights, mtp_targets, rank, 4) for rank in range(4)]
    for name in ("labels", "is_pad", "pixel_values"):
        assert torch.equal(torch.cat([getattr(part, name) for part, _, _ in parts]), getattr(batch, name)), name
    for name in ("corner", "corner_weight"):
        assert torch.equal(
            torch.cat([getattr(p.vision, name) for p, _, _ in parts], dim=1), getattr(batch.vision, name)
        )
    for name in ("labels", "weights", "is_end"):
        assert torch.equal(torch.cat([getattr(a, name) for _, _, a in parts]), getattr(mtp_targets, name)), name
    assert torch.equal(torch.cat([w for _, w, _ in parts]), weights)
    for rank, (part, _, its) in enumerate(parts):
        start, end = 16 * rank, 16 * (rank + 1)
        assert part.label_positions.tolist() == [t - start for t in batch.label_positions.tolist() if start <= t < end]
        assert its.label_positions.tolist() == [
            t - start for t in mtp_targets.label_positions.tolist() if start <= t < end
        ]
        beyond = [0] if rank == 3 else batch.input_ids[end : end + 1].tolist()
        assert part.input_ids.tolist() == batch.input_ids[start:end].tolist() + beyond
        beyond = [-1] if rank == 3 else batch.vision_index[end : end + 1].tolist()
        assert part.vision_index.tolist() == batch.vision_index[start:end].tolist() + beyond
        for name in ("cu_seqlens", "position_ids", "grid_thw"):
            assert getattr(part, name) is getattr(batch, name), name
        assert part.vision.cu_seqlens is batch.vision.cu_seqlens and part.vision.position is batch.vision.position
    plain, _, nothing = shard_batch(batch, weights, None, 1, 4)
    assert plain.input_ids.tolist() == batch.input_ids[16:32].tolist() and nothing is None
    assert len(plain.pixel_values) == len(batch.pixel_values) // 4 and plain.pixel_values.shape[1] == PATCH_VALUES
    with pytest.raises(ValueError, match="64 tokens and 64 patches cannot be shared by 3 ranks"):
        shard_batch(batch, weights, None, 0, 3)


# ── A whole run ───────────────────────────────────────────────────────────────────────────────────


def test_a_context_parallel_run_and_its_resume_by_one_process(workplace, two, tmp_path):
    """The data of two data-parallel ranks; then the last steps again from a checkpoint."""
    common = "training.gradient_accumulation_steps=2", "training.save_interval=5"
    done = train(workplace, tmp_path, 2, *common, "parallel.ulysses_parallel_size=2")
    assert done.returncode == 0, done.stderr
    shared = read_metrics(tmp_path / "metrics.jsonl")
    check_lines(shared, read_metrics(two / "metrics.jsonl"))
    weights = tensors(tmp_path)
    for file in (tmp_path / "iter_0000010").iterdir():
        file.unlink()
    (tmp_path / "iter_0000010").rmdir()
    done = train(workplace, tmp_path, 1, *common)
    assert done.returncode == 0 and "steps 6 to 10" in done.stdout, done.stderr
    check_lines(read_metrics(tmp_path / "metrics.jsonl"), shared)
    for name, value in tensors(tmp_path).items():
        assert (value - weights[name]).norm() <= 1e-4 * value.norm() + 1e-6, name


def check_lines(found: list[dict], wanted: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in wanted] == list(range(1, 11))
    for a, b in zip(found, wanted, strict=True):
        for key in ("loss", "aux_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), f"{key} of step {a['step']}"
        assert all(a[key] == b[key] for key in ("lr", "tokens", "label_tokens", "image_tokens"))
