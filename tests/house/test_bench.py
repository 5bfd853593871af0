"""The benchmark compares like with like, here with sizes too small to time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import images, lora, rows, slice_s

ROOT = Path(__file__).parents[2]
SMALL = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


@pytest.fixture
def small(monkeypatch):
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    monkeypatch.setattr(slice_s, "TEXT", slice_s.TEXT | SMALL | {"rope_parameters": rope})
    monkeypatch.setattr(slice_s, "VISION", slice_s.VISION | {"out_hidden_size": 48})
    monkeypatch.setattr(slice_s, "VOCABULARY", 300)
    monkeypatch.setattr(rows, "matmul_rate", lambda: 1e9)


def test_ours_and_the_peer_compute_the_same_loss(small):
    """Padded and packed: the losses agree, or the row raises."""
    result = rows.slice_row((7, 12, 30), 0.4, with_peer=True)
    assert result["ratio"] > 0 and result["tokens_per_second"] > 0


def test_different_losses_are_refused(small, monkeypatch):
    monkeypatch.setattr(rows, "step", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        rows.slice_row((7, 12), 1.0, with_peer=True)


def test_with_adapters_all_three_are_timed_and_weighed(small, monkeypatch):
    """Full training and both kinds of adapters: the losses agree, or the row raises."""
    monkeypatch.setattr(lora, "TOKENS", 24)
    weighed = {"ours": 1.0, "full": 2.0, "peft": 4.0}
    called = []

    def here(name):
        called.append(name)
        seconds, peak, loss = lora._measured(name)
        assert seconds > 0 and peak > 0.1
        return seconds, weighed[name], loss

    monkeypatch.setattr(lora, "in_own_process", here)
    result = lora.row()
    assert result["ratio"] > 0 and (result["memory_ratio"], result["memory_ratio_full"]) == (0.25, 0.5)
    assert called == ["peft", "full", "ours"] * 2
    monkeypatch.setattr(lora, "in_own_process", lambda name: (1.0, 1.0, 1.0 + (name == "peft")))
    with pytest.raises(RuntimeError, match="do not compute the same"):
        lora.row()


def test_bytes_that_layers_save_are_fewer_than_the_peers(small):
    result = rows.saved()
    assert 0 < result["attention_kb"] < result["peer_attention_kb"]
    assert 0 < result["delta_net_kb"] < result["peer_delta_net_kb"]


def test_unknown_rows_are_refused():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--only", "mo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--only mo: no such row; choose from slice-2048" in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_each_row_runs_under_both_allocators(as_json, monkeypatch, capsys):
    measured = []

    def run(row: str, allocator: str) -> dict:
        measured.append((row, allocator))
        return {"matmul_gflops": 1.0} if row == "rate" else {"row": row, "ratio": 1.5, "seconds": 2}

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "moe", *(["--json"] if as_json else [])])
    assert command.main() == 0
    assert measured[2:] == [("moe", "default"), ("moe", "tuned")]
    out = capsys.readouterr().out
    if as_json:
        assert [row["allocator"] for row in json.loads(out)["rows"]] == ["default", "tuned"]
    else:
        assert "ratio 1.5, seconds 2  [ratio <= 1.25]" in out and "not run: slice-2048" in out


def test_a_row_that_fails_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda row, _: {"row": row, "error": "killed", "matmul_gflops": 1.0})
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "moe"])
    assert command.main() == 1
    assert "killed" in capsys.readouterr().out


def test_image_processors_give_the_same_patches_and_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.images", "--images", "2"])
    monkeypatch.setattr(images, "ROUNDS", 2)
    images.main()
    out = capsys.readouterr().out
    assert re.search(
        r"^qwen35: \d+ images/s in one process .*\ntransformers: \d+ images/s .*\nratio \d+\.\d\d$", out, re.MULTILINE
    )
    monkeypatch.setattr(images, "read_as_peer", lambda processor, file: torch.zeros(1))
    with pytest.raises(SystemExit, match="do not give the same"):
        images.main()
