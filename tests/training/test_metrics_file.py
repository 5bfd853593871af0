"""metrics.jsonl damaged or removed by others: the run goes on, and says what is lost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from qwen35.training import metrics as module
from qwen35.training.metrics import Metrics, StepRecord, read_metrics
from qwen35.training.plots import Curves, draw_loss, smoothed


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
    draw_loss(Curves.read(tmp_path), tmp_path)
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


@pytest.mark.parametrize("count", [1, 2, 49, 50, 51, 1000])
def test_smoothing_is_the_mean_of_what_is_around(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    reach = (count // 25 | 1) // 2
    slow = [sum(part := values[max(0, i - reach) : i + reach + 1]) / len(part) for i in range(count)]
    assert smoothed(values) == pytest.approx(slow, abs=1e-12)


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Callable[[list[dict]], Figure]:
    """The figure of these lines."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))

    def drawn(lines: list[dict]) -> Figure:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw_loss(Curves.read(tmp_path), tmp_path)
        return figures[-1]

    return drawn


def test_the_first_steps_do_not_stretch_the_axis(drawn):
    """What lies in the last four fifths of a run is inside, but for its highest hundredth."""
    lines = [{"step": i, "loss": 1 + 9 / i**2 + 0.01 * (i % 7), "lr": 1e-3 / i} for i in range(1, 501)]
    lines[400]["loss"] = 50.0  # a spike
    lines[499] |= {"val_loss": 1.3, "loss": float("nan")}
    figure = drawn(lines)
    upper, _ = figure.axes
    low, high = upper.get_ylim()
    assert low < 1.0 < 1.06 < 1.3 < high < 1.4
    raw, smooth, validation = (line.get_ydata() for line in upper.lines)
    assert max(raw) == 50 and len(raw) == len(smooth) == 499 and list(validation) == [1.3]
    assert smooth[250] == pytest.approx(sum(line["loss"] for line in lines[241:260]) / 19, abs=0.02)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["loss (smoothed)", "val_loss", "lr"]


@pytest.mark.parametrize("losses", [[0.5], [0.0], [2.0, 2.0], [3.0, 1.0]])
def test_short_runs_are_drawn(drawn, losses):
    upper, _ = drawn([{"step": i, "loss": loss, "lr": 0.1} for i, loss in enumerate(losses, 1)]).axes
    low, high = upper.get_ylim()
    assert low < losses[-1] < high


def test_only_numbers_are_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "x", "lr": [1]}\n{"step": 2, "val_loss": null}\n')
    draw_loss(Curves.read(tmp_path), tmp_path)
    assert (tmp_path / "loss.png").is_file()
