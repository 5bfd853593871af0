"""NEFTune's noise: transformers' formula, by each sample's own length, on any number of ranks."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training_runs import assert_same_run, train

from qwen35.batch import PackedBatch
from qwen35.config.schema import TrainingSettings
from qwen35.device import HOST
from qwen35.parallel.context_parallel import shard_batch
from qwen35.training import neftune
from qwen35.training.metrics import read_metrics
from qwen35.training.neftune import embedding_noise

HIDDEN, ALPHA = 64, 5.0


def batch(*lengths: int) -> PackedBatch:
    ids = torch.arange(sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedBatch(ids, ids, ids.expand(3, -1), ends, torch.empty(0, 1536), torch.empty(0, 3).long())


def noise(of: PackedBatch, micro_batch: int = 0, size: int = 1, seed: int = 42, **place: int) -> torch.Tensor:
    t = TrainingSettings(save="x", train_iters=1, micro_batch_size=size, seed=seed, neftune_noise_alpha=ALPHA)
    meshes = SimpleNamespace(**{"data_rank": 0, "data_size": 1, "ulysses_rank": 0} | place)
    return embedding_noise(of, HIDDEN, t, meshes, micro_batch, HOST)


def test_the_noise_of_one_sample_is_that_of_transformers(monkeypatch):
    from transformers.integrations.neftune import neftune_post_forward_hook

    seeds = []
    wanted = torch.Generator.manual_seed

    class Recorded(torch.Generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return wanted(self, seed)

    monkeypatch.setattr(neftune.torch, "Generator", Recorded)
    ours = noise(batch(96), 7)
    embedding = nn.Embedding(96, HIDDEN)
    embedding.neftune_noise_alpha = ALPHA
    torch.manual_seed(seeds[0])
    plain = embedding(torch.arange(96))[None]
    theirs = neftune_post_forward_hook(embedding, (), plain) - plain
    assert torch.allclose(ours, theirs[0], atol=1e-6) and ours.abs().max() > 0.9 * ALPHA / (96 * HIDDEN) ** 0.5


def test_each_sample_has_the_scale_of_its_own_length():
    lengths = (40, 8, 112, 3, 29)
    for length, rows in zip(lengths, noise(batch(*lengths)).split(lengths), strict=True):
        most = ALPHA / (length * HIDDEN) ** 0.5
        assert 0.97 * most < rows.abs().max() <= most
        assert rows.std() == pytest.approx(most / 3**0.5, rel=0.1) and abs(float(rows.mean())) < 0.1 * most


def test_the_noise_goes_with_the_packed_sequence_however_they_are_split():
    """Into micro-batches, and among ranks that share them; another sequence or seed has another."""
    two = batch(30, 34, 20, 44)
    both = noise(two, 3, 2)  # packed sequences 6 and 7
    assert torch.equal(both, torch.cat([noise(batch(30, 34), 6), noise(batch(20, 44), 7)]))
    assert torch.equal(both[64:], noise(batch(20, 44), 3, data_rank=1, data_size=2))
    parts = [noise(shard_batch(two, two.labels, None, rank, 4)[0], 3, 2, ulysses_rank=rank) for rank in range(4)]
    assert torch.equal(torch.cat(parts), both)
    assert not torch.equal(noise(batch(64), 6), noise(batch(64), 7))
    assert not torch.equal(noise(batch(64), 6), noise(batch(64), 6, seed=43))


NOISE = (
    "training.neftune_noise_alpha=20",
    "training.train_iters=4",
    "training.save_interval=2",
    "training.log_interval=1",
)


@pytest.fixture(scope="module")
def noisy(workplace) -> Path:
    (workplace / "three.json").write_text(json.dumps(json.loads((workplace / "records.json").read_text())[:3]))
    save = workplace / "noisy"
    done = train(workplace, save, 2, *NOISE, *validating(workplace))
    assert done.returncode == 0, done.stderr
    return save


def validating(workplace: Path) -> tuple[str, str]:
    return f"data.val_dataset_param.basic_parameters.dataset={workplace / 'three.json'}", "training.val_interval=1"


def test_a_resumed_run_has_the_same_noise(workplace, tmp_path):
    for steps in (2, 4):
        options = (*NOISE, "training.lr_decay_style=constant", "training.lr_warmup_ratio=0")
        save = tmp_path / "whole" if steps == 4 else tmp_path / "run"
        done = train(workplace, save, 2, *options, f"training.train_iters={steps}")
        assert done.returncode == 0, done.stderr
    done = train(workplace, tmp_path / "run", 2, *options)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_ranks_that_share_the_steps_and_the_sequences_make_the_same(workplace, noisy, tmp_path):
    layouts = {
        "one": (1, "training.gradient_accumulation_steps=2"),
        "shared": (2, "parallel.ulysses_parallel_size=2", "training.gradient_accumulation_steps=2"),
    }
    lines = {"two": read_metrics(noisy / "metrics.jsonl")}
    for name, (ranks, *layout) in layouts.items():
        done = train(workplace, tmp_path / name, ranks, *NOISE, *validating(workplace), *layout)
        assert done.returncode == 0, done.stderr
        lines[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    for name in layouts:
        for key in ("loss", "grad_norm"):
            assert lines[name][0][key] == pytest.approx(lines["two"][0][key], rel=1e-5), (name, key)
        found, wanted = ([line["loss"] for line in lines[n]] for n in (name, "two"))
        assert found == pytest.approx(wanted, rel=1e-3), name


def test_a_validation_has_no_noise(workplace, noisy, tmp_path):
    """The weights hardly move: with noise and without, only the training's loss differs."""
    still = ("training.train_iters=1", "training.lr=1e-20", "training.weight_decay=0")
    lines = []
    for name, alpha in (("loud", "20"), ("quiet", "null")):
        options = (*still, *validating(workplace), f"training.neftune_noise_alpha={alpha}")
        done = train(workplace, tmp_path / name, 1, *options)
        assert done.returncode == 0, done.stderr
        lines += read_metrics(tmp_path / name / "metrics.jsonl")
    loud, quiet = lines
    assert loud["val_loss"] == quiet["val_loss"] and abs(loud["loss"] / quiet["loss"] - 1) > 1e-5
