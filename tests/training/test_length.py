"""How long a run is: epochs, whose samples are counted, and which go on as steps do."""

import re
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_run, tensors, train

from qwen35.checkpoint import load_pretrained
from qwen35.checkpoint.dcp import read_info
from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.training.metrics import read_metrics

CONSTANT = ("training.lr_decay_style=constant", "training.lr_warmup_ratio=0")  # whatever the run's length
EPOCHS = (*CONSTANT, "training.gradient_accumulation_steps=2", "training.log_interval=1")


@pytest.fixture(scope="module")
def epochs(workplace) -> tuple[Path, str, int, int]:
    """Two epochs on two ranks; the console, the steps of an epoch and its packed sequences."""
    save = workplace / "epochs"
    done = train(workplace, save, 2, *EPOCHS, "training.train_epochs=2")
    assert done.returncode == 0, done.stderr
    packed = int(re.search(r"trained\) in (\d+) packed sequences", done.stdout)[1])
    return save, done.stdout, -(-packed // 4), packed


def test_a_run_of_epochs_trains_each_sample_so_often(epochs):
    save, console, each, packed = epochs
    assert packed % 4  # the last step of an epoch is not full
    lines = read_metrics(save / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 2 * each + 1))
    tokens = int(re.search(r"an epoch is ([\d,]+) tokens", console)[1].replace(",", ""))
    assert [sum(line["tokens"] for line in part) for part in (lines[:each], lines[each:])] == [tokens, tokens]
    told = (
        f"4 packed sequences of 160 tokens per step, steps 1 to {2 * each}: 2.00 epochs in all, {each:.1f} steps each"
    )
    assert f"{told}; the last step of each takes what is left\n{save} takes 1 checkpoint of " in console
    assert f"  epoch {1 / each:.2f}  " in console and "  epoch 1.00  " in console and "  epoch 2.00  " in console


def test_one_rank_trains_the_same_epochs(workplace, epochs, tmp_path):
    save, _, each, _ = epochs
    done = train(workplace, tmp_path, 1, *EPOCHS, "training.gradient_accumulation_steps=4", "training.train_epochs=2")
    assert done.returncode == 0, done.stderr
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, save))
    assert len(one) == len(two) == 2 * each
    for a, b in zip(one, two, strict=True):
        assert [a[n] for n in ("tokens", "label_tokens", "image_tokens")] == [
            b[n] for n in ("tokens", "label_tokens", "image_tokens")
        ]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["aux_loss"] == pytest.approx(
            b["aux_loss"], rel=1e-4
        )
    weights = tensors(save)
    assert all(torch.allclose(t, weights[name], atol=2e-4) for name, t in tensors(tmp_path).items())


def test_more_epochs_go_on_as_if_the_run_had_never_ended(workplace, epochs, tmp_path):
    """From steps in the first epoch to epochs, to more of them, bit for bit; not to steps again."""
    save, _, each, packed = epochs
    for length, steps in (("iters=2", 2), ("epochs=1", each), ("epochs=1.01", each + 1), ("epochs=2", 2 * each)):
        done = train(workplace, tmp_path / "run", 2, *EPOCHS, f"training.train_{length}")
        assert done.returncode == 0, done.stderr
        assert newest_checkpoint(tmp_path / "run").name == f"iter_{steps:07}"
        assert ("settings changed since the checkpoint: training.train_" in done.stdout) == (length != "iters=2")
    assert_same_run(tmp_path / "run", save)
    assert read_info(newest_checkpoint(save)).extra["unfilled_steps"] == packed // 4
    again = train(workplace, tmp_path / "run", 2, *EPOCHS, "training.train_epochs=2")
    assert again.returncode == 0 and f"has done all its {2 * each} steps: nothing left to train" in again.stdout
    refused = train(workplace, tmp_path / "run", 2, *EPOCHS, "training.train_iters=100")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "was trained by training.train_epochs, and after its first epoch the steps of training.train_iters hold" in (
        refused.stderr
    )
    elsewhere = (f"training.load={save}", "training.init_from_hf_path=null", "training.train_epochs=2")
    refused = train(workplace, tmp_path / "other", 2, *EPOCHS, *elsewhere)
    assert refused.stderr.startswith(
        f"error: training.load: {save} has done {2 * each} steps, and training.train_epochs is 2.0; raise it to go on"
    )


def test_the_schedule_follows_the_epochs(workplace, epochs, tmp_path):
    _, _, each, _ = epochs
    options = ("training.lr_decay_style=linear", "training.lr_warmup_ratio=0.5", "training.profile.steps=9")
    done = train(workplace, tmp_path / "run", 2, *EPOCHS, *options, "training.train_epochs=1")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: training.profile: steps 3 to 11 are not all among the {each} of training.train_epochs\n"
    )
    done = train(workplace, tmp_path / "run", 2, *EPOCHS, *options[:2], "training.train_epochs=1")
    assert done.returncode == 0, done.stderr
    warmup = round(0.5 * each)
    rates = [1e-2 * (step + 1) / warmup for step in range(warmup)]
    rates += [1e-2 * (1 - done / (each - warmup)) for done in range(each - warmup)]
    assert [line["lr"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == pytest.approx(rates)


def test_a_module_with_its_own_rate_moves_as_far_in_a_run(workplace, tmp_path):
    """On two ranks; the start tells the groups, and a resume that a rate has changed."""
    one = ("training.train_iters=1", "training.lr_warmup_ratio=0")
    rate = "training.lr_by_module={model.visual: 0.125}"
    for name, options in (("plain", one), ("rated", (*one, rate))):
        done = train(workplace, tmp_path / name, 2, *options)
        assert done.returncode == 0, done.stderr
    assert re.search(r"^model.visual +[\d,]+ +0.00125 +0.1$", done.stdout, re.MULTILINE)
    assert re.search(r"^others +[\d,]+ +0.01 +0$", done.stdout, re.MULTILINE)
    before = {name: p.detach() for name, p in load_pretrained(workplace / "weights").named_parameters()}
    plain, rated = tensors(tmp_path / "plain"), tensors(tmp_path / "rated")
    assert before.keys() == plain.keys() and any((plain[name] != p).any() for name, p in before.items())
    for name, p in before.items():
        share = 0.125 if name.startswith("model.visual.") else 1
        assert torch.allclose(rated[name] - p, share * (plain[name] - p), rtol=1e-4, atol=2e-7), name
    done = train(workplace, tmp_path / "rated", 2, "training.train_iters=2", "training.lr_by_module.model.visual=0.5")
    assert done.returncode == 0, done.stderr
    assert "training.lr_by_module.model.visual: 0.125 -> 0.5" in done.stdout
