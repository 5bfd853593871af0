"""The three loss types against their formulas; the learning rate; the FLOPs."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peer import config_dict, pack, pair, random_model, sample

from qwen35.config.schema import TrainingSettings
from qwen35.model import ModelConfig, Qwen35, load_config
from qwen35.model.lora import LoraSpec, add_adapters
from qwen35.training.flops import Flops
from qwen35.training.loss import token_weights
from qwen35.training.optimizer import learning_rate
from qwen35.training.parameter_groups import freeze


def masked(lengths_and_trained: list[tuple[int, int]]):
    """Packed samples (tokens, trained), of which the last `trained` tokens have labels."""
    samples = []
    for i, (length, trained) in enumerate(lengths_and_trained):
        s = sample([length], seed=i)
        labels = torch.full((length,), -100)
        if trained:
            labels[length - trained - 1 : length - 1] = s.labels[length - trained - 1 : length - 1]
        samples.append(dataclasses.replace(s, labels=labels))
    return samples


def test_losses_equal_their_formulas():
    samples = masked([(10, 4), (20, 1), (7, 0), (9, 5)])
    batch = pack(samples)
    token_loss = torch.rand(len(batch.labels))
    valid = batch.labels != -100
    bounds = batch.cu_seqlens.tolist()
    means = [token_loss[a:b][valid[a:b]].mean() for a, b in pairwise(bounds) if valid[a:b].any()]
    expected = {
        "default": token_loss[valid].mean(),
        "per_sample_loss": torch.stack(means).mean(),
        "per_token_loss": token_loss[valid].sum(),  # divided by the step's number of tokens
    }
    for kind, value in expected.items():
        assert torch.isclose((token_weights(batch, kind) * token_loss).sum(), value), kind


@pytest.mark.parametrize("kind", ["default", "per_sample_loss", "per_token_loss"])
def test_a_batch_without_labels_has_zero_weights(kind):
    assert not token_weights(pack(masked([(5, 0), (6, 0)])), kind).any()


def test_per_token_loss_does_not_depend_on_the_split():
    ours = random_model(config_dict())
    samples = masked([(10, 4), (20, 1), (7, 0), (9, 5)])
    number = 10
    results = []
    for split in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [0, 2]]):
        ours.zero_grad()
        for part in split:
            batch = pack([samples[i] for i in part])
            ours.loss(batch, token_weights(batch, "per_token_loss") / number)[0].backward()
        results.append({n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None})
    for other in results[1:]:
        for name, grad in results[0].items():
            assert torch.allclose(grad, other[name], rtol=1e-4, atol=1e-6 * float(grad.abs().max()) + 1e-9), name


def test_the_loss_is_transformers_own():
    from peer import peer_inputs

    ours, theirs = pair(config_dict(moe=False))
    s = sample([30, (4, 4), 12])
    loss, _, _ = ours.loss(s, token_weights(s, "default"))
    reference = theirs(**peer_inputs(s), labels=s.input_ids[None]).loss
    assert torch.isclose(loss, reference, rtol=1e-5)


def settings(**kwargs) -> TrainingSettings:
    return TrainingSettings(train_iters=100, save="x", lr=1.0, min_lr=0.1, lr_warmup_ratio=0.1, **kwargs)


def test_learning_rate():
    for style, middle in (("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)):
        t = settings(lr_decay_style=style)
        rates = [learning_rate(i, t, 100) for i in range(100)]
        assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0, style  # rises over ten steps
        assert rates[55] == pytest.approx(middle), style
        assert rates[99] == pytest.approx({"constant": 1.0, "linear": 0.11, "cosine": 0.1003}[style], abs=1e-3)
    assert learning_rate(0, dataclasses.replace(settings(), lr_warmup_ratio=0.0), 100) == 1.0


def on_meta(config: ModelConfig, mtp: bool = False) -> Qwen35:
    with torch.device("meta"):
        return Qwen35(config, mtp=mtp)


def test_flops_of_a_dense_model_are_six_a_weight_and_the_rest():
    """Against matrix sizes added up by hand, without attention pairs, vision and delta rule."""
    config = load_config(config_dict(moe=False))
    text = dataclasses.replace(config.text, layer_types=("full_attention",))
    config = dataclasses.replace(config, text=text)
    nothing = torch.zeros(0, 3, dtype=torch.long)
    tokens = 1000
    weights = 48 * (4 * 32 * 2) + 2 * 48 * 64 + 128 * 48 + 3 * 48 * 72
    each_alone = torch.ones(tokens)
    pairs = 0.5 * tokens * 4 * 128
    expected = 3 * (2 * tokens * weights + pairs + 2 * tokens * 48 * 160)
    assert Flops(on_meta(config)).of(tokens, each_alone, tokens, nothing) == expected


def test_flops_of_the_published_sizes():
    """2 FLOPs per weight and token in forward: close to the active parameters by each name."""
    nothing, bounds = torch.zeros(0, 3, dtype=torch.long), torch.tensor([1024])
    counts = {
        c["size"]: c for c in json.loads((Path(__file__).parents[1] / "fixtures/parameter_counts.json").read_text())
    }
    for size, c in counts.items():
        config = load_config(Path(__file__).parents[2] / f"assets/configs/{size}.json")
        flops = Flops(on_meta(config)).of(1024, bounds, 1024, nothing) / 3 / 1024
        tied = config.tie_word_embeddings  # the embedding costs nothing, the head its weights
        weights = c["active"] - (0 if tied else c["embed"])
        assert 1.0 < flops / (2 * weights) < 1.2, size


# matrix elements per token of the small dense config, added up by hand
DELTA_IN, CONV = 48 * (2 * 32 + 2 * 96 + 2 * 4), (2 * 32 + 96) * 4
DELTA_OUT, UP, DOWN = 96 * 48, 48 * 2 * 72, 72 * 48
QKV, OUT, HEAD = 48 * (2 * 128 + 2 * 64), 128 * 48, 48 * 160
RULE = 4 * (4 * 64 * 16 + 64 * (16 + 24) + 6 * 16 * 24 + 2 * 64 * 24)  # for four value heads
PATCH, BLOCK = 3 * 2 * 16 * 16 * 32, 4 * 32 * 32 + 2 * 32 * 56
FRAME_PAIRS = 4 * 32 * 2 * 24**2  # for two blocks, on one image of 4 x 6 patches
MERGER = (128 * 128 / 4, 128 * 48 / 4)  # per patch
TOKENS, LABELS, PATCHES, PAIRS = 20, 9, 24, 4 * 128 * (12**2 + 8**2) / 2
LAYER = {"delta": DELTA_IN + CONV + DELTA_OUT + UP + DOWN, "attention": QKV + OUT + UP + DOWN}
TOWER = PATCHES * 2 * (PATCH + 2 * BLOCK + sum(MERGER)) + FRAME_PAIRS
LAYERS = TOKENS * (2 * (3 * LAYER["delta"] + LAYER["attention"]) + 3 * RULE) + PAIRS
TOP = LABELS * 2 * HEAD
FORWARD = TOWER + LAYERS + TOP
FROZEN = {  # model.freeze -> FLOPs of forward and backward
    (): 3 * FORWARD - PATCHES * 2 * PATCH,  # pixels need no gradient
    ("model.visual",): TOWER + 3 * (LAYERS + TOP),  # the trained embedding makes all above it need input gradients
    # the merger is trained, from its norm on; above it only input gradients are needed
    ("model.visual.blocks", "model.visual.patch_embed", "model.visual.pos_embed", "model.language_model", "lm_head"): (
        TOWER
        + PATCHES * 2 * (2 * MERGER[0] + 2 * MERGER[1])
        + 2 * (LAYERS + TOP)
        + TOKENS * 3 * RULE
        + PAIRS  # their inputs all have gradients
    ),
    # only the last layer, attention, is trained, from its norm on; the head passes the gradient
    # down
    ("model.visual", "model.language_model.embed_tokens", "model.language_model.layers.[012]", "lm_head"): (
        TOWER + LAYERS + TOP + TOKENS * 4 * LAYER["attention"] + 2 * PAIRS + TOP
    ),
    # below the K and V projections nothing is trained; above them input gradients, and the weight
    # gradients of o_proj and the head
    (
        "model.visual",
        "model.language_model.embed_tokens",
        "model.language_model.layers.[012]",
        "model.language_model.layers.3.input_layernorm",
        "model.language_model.layers.3.mlp",
        "model.language_model.layers.3.self_attn.q_proj",
    ): (
        FORWARD
        + TOKENS * 2 * 48 * 2 * 64  # weight gradients of the K and V projections
        + 2 * PAIRS
        + TOKENS * 4 * OUT
        + TOKENS * 2 * (UP + DOWN)  # input gradients only
        + 2 * TOP
    ),
}


@pytest.mark.parametrize("patterns", FROZEN, ids=lambda patterns: str(len(patterns)))
def test_flops_with_frozen_parts(patterns):
    """Forward, the gradients of trained weights, and of inputs with something trained below."""
    model = on_meta(load_config(config_dict(moe=False)))
    freeze(model, patterns)
    found = Flops(model).of(TOKENS, torch.tensor([12, 8]), LABELS, torch.tensor([[1, 4, 6]]))
    assert found == FROZEN[patterns]


def test_flops_of_frozen_experts():
    """Two of eight experts are used; frozen ones need input gradients only."""
    config, nothing = load_config(config_dict()), torch.zeros(0, 3, dtype=torch.long)
    trained, frozen = on_meta(config, mtp=True), on_meta(config, mtp=True)
    freeze(frozen, ["model.language_model.layers.*.mlp.experts"])
    whole, less = (Flops(model).of(10, torch.ones(10), 6, nothing, mtp_labels=4) for model in (trained, frozen))
    assert whole - less == 10 * 4 * 2 * 2 * (3 * 48 * 24)
    freeze(frozen, ["model", "lm_head"])  # only the layer of multi-token prediction is trained
    plain, learning = on_meta(config), Flops(frozen)
    freeze(plain, ["lm_head", "model.language_model", "model.visual.merger.linear_fc1"])
    assert learning.flops_per["label"] == 2 * HEAD and learning.flops_per["mtp_label"] == 2 * 2 * HEAD
    assert Flops(plain).flops_per["label"] == 2 * 2 * HEAD


def adapted(config: dict, r: int, targets: tuple[str, ...], experts: tuple[str, ...] = ()) -> Qwen35:
    model = on_meta(load_config(config))
    add_adapters(model, LoraSpec(r, 16.0, targets, experts, (), r, False))
    return model


def test_flops_of_adapters():
    """Nothing is trained below q_proj's A; below B there always is, the A."""
    model = adapted(config_dict(moe=False), 8, ("self_attn.q_proj", "self_attn.o_proj"))
    found = Flops(model).of(TOKENS, torch.tensor([12, 8]), LABELS, torch.tensor([[1, 4, 6]]))
    q, o = TOKENS * (4 * 8 * 48 + 6 * 8 * 256), TOKENS * 6 * 8 * (128 + 48)
    assert found == FORWARD + q + o + 2 * PAIRS + TOKENS * 2 * (OUT + UP + DOWN) + TOP


def test_flops_of_the_adapters_of_experts():
    """Those of the two experts that a token chooses; nothing is trained below the first A."""
    nothing, experts = torch.zeros(0, 3, dtype=torch.long), ("experts.gate_up_proj", "experts.down_proj")
    few, many = (Flops(adapted(config_dict(), r, (), experts)).of(10, torch.ones(10), 6, nothing) for r in (8, 16))
    assert many - few == 10 * 2 * 8 * (4 * 6 * (48 + 48 + 24 + 48) - 2 * 48)
