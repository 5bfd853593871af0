"""The three loss types by their formulas, written out; per_token_loss whatever the split; the learning rate; the FLOPs."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peer import config_dict, pack, pair, sample

from qwen35.flops import training_flops
from qwen35.loss import token_weights
from qwen35.model import load_config
from qwen35.optim import learning_rate
from qwen35.settings import TrainingSettings


def masked(lengths_and_trained: list[tuple[int, int]]):
    """Packed samples of so many tokens, of which the last so many before the end are trained."""
    samples = []
    for i, (length, trained) in enumerate(lengths_and_trained):
        s = sample([length], seed=i)
        labels = torch.full((length,), -100)
        if trained:
            labels[length - trained - 1 : length - 1] = s.labels[length - trained - 1 : length - 1]
        samples.append(dataclasses.replace(s, labels=labels))
    return samples


def test_the_formulas():
    samples = masked([(10, 4), (20, 1), (7, 0), (9, 5)])
    batch = pack(samples)
    token_loss = torch.rand(len(batch.labels))
    valid = batch.labels != -100
    bounds = batch.cu_seqlens.tolist()
    means = [token_loss[a:b][valid[a:b]].mean() for a, b in pairwise(bounds) if valid[a:b].any()]
    expected = {
        "default": token_loss[valid].mean(),
        "per_sample_loss": torch.stack(means).mean(),
        "per_token_loss": token_loss[valid].sum(),  # the step's number of tokens divides it
    }
    for kind, value in expected.items():
        assert torch.isclose((token_weights(batch, kind) * token_loss).sum(), value), kind


@pytest.mark.parametrize("kind", ["default", "per_sample_loss", "per_token_loss"])
def test_nothing_trained_weighs_nothing(kind):
    assert not token_weights(pack(masked([(5, 0), (6, 0)])), kind).any()


def test_per_token_loss_does_not_depend_on_the_split():
    ours, _ = pair(config_dict())
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
        rates = [learning_rate(i, t) for i in range(100)]
        assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0, style  # rises over ten steps
        assert rates[55] == pytest.approx(middle), style
        assert rates[99] == pytest.approx({"constant": 1.0, "linear": 0.11, "cosine": 0.1003}[style], abs=1e-3)
    assert learning_rate(0, dataclasses.replace(settings(), lr_warmup_ratio=0.0)) == 1.0


def test_flops_of_a_dense_model_are_six_a_weight_and_the_rest():
    """Against matrix sizes added up by hand for one small config, without attention pairs, vision and delta rule."""
    config = load_config(config_dict(moe=False))
    text = dataclasses.replace(config.text, layer_types=("full_attention",))
    config = dataclasses.replace(config, text=text)
    nothing = torch.zeros(0, 3, dtype=torch.long)
    tokens = 1000
    weights = 48 * (4 * 32 * 2) + 2 * 48 * 64 + 128 * 48 + 3 * 48 * 72
    each_alone = torch.ones(tokens)
    pairs = 0.5 * tokens * 4 * 128
    expected = 3 * (2 * tokens * weights + pairs + 2 * tokens * 48 * 160)
    assert training_flops(config, tokens, each_alone, tokens, nothing) == expected


def test_flops_of_the_published_sizes():
    """2 FLOPs a weight and token, forward: close to the active parameters that each size is named by."""
    nothing, bounds = torch.zeros(0, 3, dtype=torch.long), torch.tensor([1024])
    counts = {c["size"]: c for c in json.loads((Path(__file__).parent / "data/parameter_counts.json").read_text())}
    for size, c in counts.items():
        config = load_config(Path(__file__).parents[1] / f"assets/configs/{size}.json")
        flops = training_flops(config, 1024, bounds, 1024, nothing) / 3 / 1024
        tied = config.tie_word_embeddings  # the embedding itself costs nothing, the head as much as its weights
        weights = c["active"] - (0 if tied else c["embed"])
        assert 1.0 < flops / (2 * weights) < 1.2, size
