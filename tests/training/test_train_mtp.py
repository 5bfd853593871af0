"""Whole runs with multi-token prediction: processes, resuming, the export, and what is refused."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_cases import assert_same_bytes
from hf_folder import write_hf
from training_runs import tensors, train, with_plots

from qwen35.checkpoint.convert import dcp_to_hf
from qwen35.checkpoint.hf import load_pretrained
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.model import Qwen35
from qwen35.training.metrics import read_metrics

ON = (
    "model.mtp_num_layers=1",
    "model.mtp_loss_scaling_factor=0.5",
    "training.train_iters=4",
    "training.log_interval=1",
)
KIND = "model.loss_type=per_token_loss"  # whose denominators are of all ranks


@pytest.fixture(scope="module")
def place(workplace, tmp_path_factory) -> Path:
    """The records of the other whole runs, and a model that has the MTP layer."""
    folder = tmp_path_factory.mktemp("mtp")
    config = json.loads((workplace / "weights/config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    write_hf(Qwen35.from_config(config, mtp=True).state_dict(), config, folder / "weights")
    for file in (workplace / "weights").iterdir():
        if file.suffix in (".json", ".jinja") and not (folder / "weights" / file.name).exists():
            shutil.copy(file, folder / "weights")
    recipe = (workplace / "recipe.yaml").read_text()
    recipe = yaml.safe_load(recipe)
    recipe["data"]["val_dataset_param"] = {
        "basic_parameters": {"dataset": str(workplace / "records.json"), "max_samples": 7}
    }
    recipe["training"]["val_interval"] = 3
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(recipe).replace(str(workplace / "weights"), str(folder / "weights"))
    )
    return folder


@pytest.fixture(scope="module")
def two(place) -> Path:
    settings = "training.save_interval=2", "parallel.recompute=true"
    done = train(place, place / "two", 2, *ON, KIND, *settings, how=with_plots)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nmtp ") == 1 and "  mtp_loss " in done.stdout
    return place / "two"


def test_two_processes_give_the_losses_of_one(place, two):
    done = train(place, place / "one", 1, *ON, KIND, "training.gradient_accumulation_steps=2")
    assert done.returncode == 0, done.stderr
    one, both = read_metrics(place / "one/metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert len(one) == len(both) == 4
    for a, b in zip(one, both, strict=True):
        for key in ("loss", "mtp_loss", "aux_loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), f"{key} of step {a['step']}"
    for a, b in zip([one[2], one[3]], [both[2], both[3]], strict=True):
        assert b["val_tokens"] == a["val_tokens"]
        for key in ("val_loss", "val_mtp_loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), f"{key} of step {a['step']}"
    assert one[-1]["mtp_loss"] < 0.95 * one[0]["mtp_loss"]
    reference = tensors(place / "one")
    assert any(name.startswith("mtp.") for name in reference)
    for name, value in tensors(two).items():
        assert (value - reference[name]).norm() <= 1e-5 * value.norm() + 1e-6, name


def test_resume_is_bit_exact(place, two, tmp_path):
    save = tmp_path / "again"
    subprocess.run(["cp", "-r", two, save], check=True)
    subprocess.run(["rm", "-r", save / "iter_0000004"], check=True)
    done = train(place, save, 2, *ON, KIND, "training.save_interval=2", "parallel.recompute=true")
    assert done.returncode == 0, done.stderr
    first, second = read_metrics(two / "metrics.jsonl"), read_metrics(save / "metrics.jsonl")
    same = ("step", "loss", "mtp_loss", "aux_loss", "grad_norm", "val_loss", "val_mtp_loss")
    assert [[line.get(k) for k in same] for line in first] == [[line.get(k) for k in same] for line in second]
    for prefix in ("model.", "optimizer."):
        a, b = tensors(two, prefix), tensors(save, prefix)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_trained_layer_is_exported(place, two, tmp_path):
    """In the original's layout, with a tensor per expert."""
    dcp_to_hf(two, place / "weights", tmp_path / "hf")
    source, out = HFFolder(place / "weights"), HFFolder(tmp_path / "hf")
    assert source.specs == out.specs and source.file_of == out.file_of
    names = [n for n in source.specs if n.startswith("mtp.")]
    assert "mtp.layers.0.mlp.experts.7.up_proj.weight" in names
    assert not any(torch.equal(source.read(n), out.read(n)) for n in names)
    again = dict(load_pretrained(tmp_path / "hf", torch.float32, mtp=True).named_parameters())
    for name, value in tensors(two).items():
        assert torch.allclose(again[name], value, rtol=2**-8, atol=1e-30), name


def test_an_untrained_layer_is_the_originals(place, tmp_path):
    done = train(place, tmp_path / "run", 1, *ON, "training.train_iters=1", "model.freeze=[mtp]")
    assert done.returncode == 0, done.stderr
    dcp_to_hf(tmp_path / "run", place / "weights", tmp_path / "hf")
    source, out = HFFolder(place / "weights"), HFFolder(tmp_path / "hf")
    kept = {n: source.read(n) for n in source.specs if n.startswith("mtp.")}
    assert_same_bytes({n: out.read(n) for n in kept}, kept)
    assert not torch.equal(source.read("lm_head.weight"), out.read("lm_head.weight"))


def test_training_mtp_without_its_weights_is_refused(workplace, tmp_path):
    """It would start from random weights, and the export has no place for it."""
    done = train(workplace, tmp_path / "run", 1, *ON)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "mtp.fc.weight" in done.stderr and "it holds no mtp.*" in done.stderr
    assert "start from a published checkpoint, or set model.mtp_num_layers: 0" in done.stderr
    assert not list((tmp_path / "run").glob("iter_*"))


def test_a_resume_that_would_lose_mtp_is_refused(place, two):
    done = train(place, two, 2, KIND, "training.train_iters=6")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "iter_0000004 was trained with model.mtp_num_layers: 1" in done.stderr
