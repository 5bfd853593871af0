"""metrics.jsonl damaged or removed by others: the run goes on, and says what is lost."""

import json
from pathlib import Path

import pytest
import torch

from qwen35.training import metrics as module
from qwen35.training.metrics import Metrics, StepRecord, draw_loss, read_metrics


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor: None)


def begin(folder: Path, done: int) -> Metrics:
    return Metrics(folder, ["visual"], 10, done, torch.device("cpu"), None)


def step(metrics: Metrics, number: int) -> None:
    sums = torch.tensor([1.0, 0.0, 10.0, 5.0, 2.0])
    metrics.record(StepRecord(number, 1e-3, 0.0, 0.0, sums, torch.tensor([1.0])))
    metrics.flush(patience=3)


def text(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": n, "loss": 1.5, "lr": 0.1}).encode() + b"\n" for n in steps)


DAMAGE = {
    "words": b"what is this\n",
    "a byte that is not UTF-8": b'{"step": 3, "loss": "\xff"}\n',
    "another value": b"[3]\n",
    "no step": b'{"loss": 3}\n',
    "a step that is none": b'{"step": "3"}\n',
    "nesting": b"[" * 100_000 + b"\n",
    "many digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "nothing": b"\n",
    "zeros": bytes(4096) + b"\n",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_resume_keeps_the_steps_behind_a_damaged_line(tmp_path, caplog, kind):
    """It keeps the damaged file under a new name each time, and names the line."""
    file, before = tmp_path / "metrics.jsonl", text(1, 2) + DAMAGE[kind] + text(4, 5, 6)
    for number in (1, 2):
        file.write_bytes(before)
        begin(tmp_path, 5)
        assert file.read_bytes() == text(1, 2, 4, 5)
        assert (tmp_path / f"metrics.damaged{number}").read_bytes() == before
        [message] = caplog.messages
        assert message.startswith(f"{file}: line 3 ") and f"metrics.damaged{number} " in message
        caplog.clear()
    file.write_bytes(before)
    draw_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_truncated_last_line_is_dropped_silently(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(text(1, 2, 3) + text(4)[:-9])
    begin(tmp_path, 3)
    assert file.read_bytes() == text(1, 2, 3)
    assert not caplog.messages
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_removed_file_begins_anew(tmp_path, caplog):
    metrics, file = begin(tmp_path, 0), tmp_path / "metrics.jsonl"
    for number in (1, 2):
        step(metrics, number)
    file.unlink()
    step(metrics, 3)
    assert any(message.startswith(f"{file} has been removed") for message in caplog.messages)
    metrics.log_validation({"val_loss": 2.0, "val_time": 0.1}, [])
    assert [(line["step"], line.get("val_loss")) for line in read_metrics(file)] == [(3, 2.0)]
    file.unlink()
    metrics.log_validation({"val_loss": 3.0, "val_time": 0.1}, [])
    step(metrics, 4)
    assert [(line["step"], line.get("val_loss")) for line in read_metrics(file)] == [(3, 3.0), (4, None)]
    file.write_bytes(b"another's\n")
    metrics.log_validation({"val_loss": 4.0, "val_time": 0.1}, [])
    assert file.read_bytes().startswith(b"another's\n{")
    assert [(line["step"], line.get("val_loss")) for line in read_metrics(file)] == [(4, 4.0)]


def test_the_remaining_time_leaves_out_the_first_interval_and_counts_pauses(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    metrics = Metrics(tmp_path, ["visual"], 100, 0, torch.device("cpu"), None, steps_per_epoch=40)
    for number, seconds in enumerate((50, 1, 2, 1, 1, 1, 1), 1):
        clock[0] += seconds
        step(metrics, number)
        clock[0] += 3  # a save
        metrics.restart_clock()
    first, second, third, *_, sixth, estimate, seventh = caplog.messages
    assert first.endswith("  epoch 0.03  50.00 s  ETA 1:22:30")
    assert second.endswith("  epoch 0.05  1.00 s  ETA 0:06:32") and third.endswith("  epoch 0.07  2.00 s  ETA 0:07:16")
    assert sixth.endswith("  ETA 0:06:35") and "94 steps" in estimate and "0:06:35" in estimate
    assert seventh.startswith("step      7  ")


def test_only_numbers_are_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "x", "lr": [1]}\n{"step": 2, "val_loss": null}\n')
    draw_loss(tmp_path)
    assert (tmp_path / "loss.png").is_file()
