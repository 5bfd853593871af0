"""Whole runs with expert parallelism: started from whole experts, stopped, resumed, exported."""

import shutil

import pytest
import torch
from peer import config_dict, pack, sample
from training_runs import assert_export_is_the_run, tensors, train

from qwen35.model import Qwen35
from qwen35.training.metrics import read_metrics

SPLIT = ("parallel.expert_parallel_size=2", "training.save_interval=2", "parallel.recompute=true")
SAME = ("step", "loss", "aux_loss", "grad_norm", "lr", "tokens")


def test_load_counts_the_tokens_of_each_expert():
    model, batch = Qwen35.from_config(config_dict()), pack([sample([9, (4, 4), 6]), sample([21], seed=1)])
    chosen = []
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda module, inputs, out: chosen.append(out[0].flatten().bincount(minlength=8))
        )
    load = torch.zeros(4, 8)
    for _ in range(2):
        model.loss(batch, torch.ones(len(batch.labels)), load=load)
    assert torch.equal(load, 2 * torch.stack(chosen[:4])) and load.sum() == 2 * 4 * 2 * 42


@pytest.fixture(scope="module")
def split(workplace, two, tmp_path_factory):
    """Steps 6 to 10 of the run `two`, from its checkpoint without expert parallelism."""
    save = tmp_path_factory.mktemp("experts") / "split"
    shutil.copytree(two, save)
    shutil.rmtree(save / "iter_0000010")
    done = train(workplace, save, 2, *SPLIT)
    assert done.returncode == 0, done.stderr
    assert "steps 6 to 10" in done.stdout
    assert "weights 1 x 2 (" in done.stdout and "experts 1 x 1 x 2 (" in done.stdout
    return save


def test_expert_parallelism_trains_the_same(two, split):
    for a, b in zip(read_metrics(two / "metrics.jsonl"), read_metrics(split / "metrics.jsonl"), strict=True):
        for key in SAME:
            assert b[key] == pytest.approx(a[key], rel=1e-5), f"{key} of step {a['step']}"
        assert b["expert_load"] == pytest.approx(a["expert_load"], rel=0.05) and len(b["expert_load"]) == 2
        assert all(1 <= ratio <= 4 for ratio in b["expert_load"])  # two of eight experts a token
    weights, wanted = tensors(split), tensors(two)
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        assert (weight - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name


def test_resume_is_bit_exact(workplace, split, tmp_path):
    save = tmp_path / "again"
    shutil.copytree(split, save)
    shutil.rmtree(save / "iter_0000010")
    done = train(workplace, save, 2, *SPLIT, "training.init_model_with_meta_device=false")
    assert done.returncode == 0, done.stderr
    assert "steps 9 to 10" in done.stdout
    first, second = read_metrics(split / "metrics.jsonl"), read_metrics(save / "metrics.jsonl")
    assert [[line[k] for k in SAME] for line in first] == [[line[k] for k in SAME] for line in second]
    for prefix in ("model.", "optimizer."):
        a, b = tensors(split, prefix), tensors(save, prefix)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_export_has_all_experts(workplace, split, tmp_path):
    assert_export_is_the_run(split, workplace / "weights", tmp_path / "hf")
