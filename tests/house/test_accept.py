"""make accept on a CPU with small sizes: every check, failures, the report, the rates."""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from forked import Forked, launched
from training_runs import free_port

import kernels
from accept import __main__ as command
from accept import numerics, speed, task
from accept.report import Report, Row, clean
from accept.task import Task, distance
from qwen35.device import HOST
from qwen35.errors import SettingError
from rehearse.rates import BEST, WORST, RateRange, Rates, rates_text, read_rates

ROOT = Path(__file__).parents[2]
STARTS = ROOT / "tests/starts/sitecustomize.py"  # in whose place is the fixture's
PARTS = ("machine", "operators", "layers", "ranks", "runs", "speed", "slice")
SECRET = "hf_abcdefghijkl"


@pytest.fixture
def accept(tmp_path):
    """Run it, forked: others start Python. -> exit status, output, JSON, Markdown"""

    def run() -> tuple[int, str, dict, str]:
        with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
            variables = {
                "PYTHONPATH": f"{STARTS.parent}:{ROOT}",
                "TMPDIR": temporary,
                "HF_TOKEN": SECRET,
                "OMP_NUM_THREADS": "1",
            }
            variables |= {"MASTER_PORT": str(free_port()), "NPUS_PER_NODE": "2"}
            command = [sys.executable, "-m", "accept", "--small", "--out", str(tmp_path / "out")]
            process = Forked(launched, command, variables)
            out, err = process.communicate(600)  # until none is left of all processes that it started
            assert not list(Path(temporary).iterdir())
        assert process.returncode in (0, 1), err
        [report], [text] = (tmp_path / "out").glob("*.json"), (tmp_path / "out").glob("*.md")
        return process.returncode, out, json.loads(report.read_text()), text.read_text()

    return run


def test_all_checks_hold_on_a_cpu(accept, tmp_path):
    code, out, report, text = accept()
    assert code == 0, out
    assert tuple(report["rows"]) == PARTS and all(f"**{part}**" in text for part in PARTS)
    rows = {row["what"]: row for part in PARTS for row in report["rows"][part]}
    assert {
        "chunk_gated_delta_rule, torch.bfloat16",
        "MoE of a layer, torch.float32",
        "all-to-all, 1 MiB",
    } <= rows.keys()
    assert rows["8 steps on 2 ranks beside one"]["status"] == "held"
    killed = rows["killed after a checkpoint and resumed, ranks: 1"]
    assert killed["status"] == "held" and killed["wanted"] == "bit for bit, training.deterministic=true"
    assert {row["rate"] for row in rows.values() if row["rate"]} == {"flops", "memory", "within", "host"}
    assert not any(
        row["status"] in ("off", "slower") for row in rows.values()
    )  # a CPU is slower than an NPU, and no news
    assert "on a CPU no speed is compared" in report["verdict"] and report["verdict"] in text
    assert not (tmp_path / "out/rates.yaml").exists()
    for never in (SECRET, str(ROOT), str(Path.home()) + "/", str(tmp_path), "127.0.0.1"):
        assert never not in text and never not in json.dumps(report)


def test_wrong_kernel_is_off_and_the_others_are_held(monkeypatch, tmp_path, capsys):
    right = kernels.swiglu
    monkeypatch.setattr(kernels.Kernels, "swiglu", lambda x: right(x) * 1.001)
    numerics.check_operators(Task(tmp_path, small=True))
    rows = [Row(**json.loads(line)) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and {row.status for row in rows} == {"held", "off"}
    [off] = [row for row in rows if row.status == "off"]
    assert off.what == "swiglu, torch.float32"  # of bf16, 0.1% is a rounding
    assert off.found.startswith("forward 1.0e-03, gradients 1.0e-03") and off.wanted.startswith("<= 1e-04, fp32: ")
    report = Report("host", "today")
    report.add("operators", rows, 1.0, {})
    assert command.finish(report, tmp_path / "out", is_whole=True) == 1
    assert "19 held, 1 off" in capsys.readouterr().out
    assert "| off | swiglu, torch.float32 | forward 1.0e-03" in (tmp_path / "out/host-today.md").read_text()


def test_reason_of_a_failed_rank_is_reported(monkeypatch, tmp_path, capsys):
    dies = """
import os, torch.distributed
def refuse(*args): raise RuntimeError("HCCL is out of luck")
if os.environ.get("RANK") == "1": torch.distributed.reduce_scatter_tensor = refuse
"""
    (tmp_path / "sitecustomize.py").write_text(STARTS.read_text() + dies)
    for name, value in {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MASTER_PORT": free_port(), "NPUS_PER_NODE": 2}.items():
        monkeypatch.setenv(name, str(value))
    report = Report("host", "today")
    command.run_check(report, "ranks", small=True)
    assert command.finish(report, tmp_path / "out", is_whole=False) == 1
    assert [row.status for row in report.rows["ranks"]] == ["info", "info", "off"]  # earlier rows stay
    assert report.rows["ranks"][-1].found == "rank 1: HCCL is out of luck"
    assert "  off     runs to its end: rank 1: HCCL is out of luck\n" in capsys.readouterr().out


def test_check_over_its_time_limit_is_off(monkeypatch, tmp_path):
    monkeypatch.setitem(command.CHECKS, "speed", 0.2)
    report = Report("host", "today")
    command.run_check(report, "speed", small=True)
    assert report.rows["speed"] == [Row("runs to its end", "off", "time limit of 0.2 s exceeded")]
    assert command.finish(report, tmp_path, is_whole=False) == 1


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/project/ckpt/tiny: no room", "…/tiny: no room"),
        ("~/Ascend/set_env.sh, and configs/tiny.yaml", "…/set_env.sh, and configs/tiny.yaml"),
        (
            "that of file:///home/me/project, from https://example.org/a/b",
            "that of …/project, from https://example.org/a/b",
        ),
        ("12.5 GB/s | 3 ms/step", "12.5 GB/s / 3 ms/step"),
        ("rank 1 at 10.0.0.12:6000, fe80::1:2:3a", "rank 1 at <address>:6000, <address>"),
        ("torch 2.7.1.post2, CANN 8.5.0.1.2", "torch 2.7.1.post2, CANN 8.5.0.1.2"),
        ("token s3cr3t-s3cr3t is refused", "token <secret> is refused"),
        ("two\nlines at 12:30:05", "two lines at 12:30:05"),
    ],
)
def test_report_has_no_paths_addresses_or_secrets(text, left):
    assert clean(text, {"MY_API_KEY": "s3cr3t-s3cr3t", "HOME": "/home/me", "SECRET": ""}) == left


def test_nan_is_off(tmp_path):
    ours, exact = torch.tensor([1.0, float("nan")]), torch.ones(2)
    assert distance([exact, ours], [exact, exact]) != distance([exact], [exact]) == 0
    Task(tmp_path, True).compare("a", {"forward": distance([exact, ours, exact], [exact] * 3)}, 1e-4, "")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["status"] == "off"


@pytest.mark.parametrize(
    ("seconds", "gigabytes", "statuses"), [(0.3, 10.5, ["held", "held"]), (0.5, 8, ["slower", "off"])]
)
def test_on_npus_time_and_memory_are_compared_with_the_rehearsal(monkeypatch, tmp_path, seconds, gigabytes, statuses):
    """With the measurements of an NPU given."""
    monkeypatch.setattr(task, "has_own_memory", lambda device: True)
    given = {"init_process": HOST, "train": (seconds, 1e12), "matmul_rate": 1e13, "peak_memory": gigabytes * 1e9}
    given["rehearse"] = {"best": 0.1, "worst": 0.4, "peak": 1e10}
    for name, value in given.items():
        monkeypatch.setattr(speed, name, lambda *_, value=value: value)
    speed.check_slice(Task(tmp_path, small=False))
    rows = [Row(**json.loads(line)) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row.status for row in rows] == statuses
    assert rows[0].what == "4 layers of 4B, 248,320 words, 4,096 tokens" and "0.100 to 0.400 s a step" in rows[0].wanted
    assert f"MFU {0.1 / seconds:.1%}" in rows[0].found and "10.00 GB rehearsed" in rows[1].wanted


# ── rates.yaml ────────────────────────────────────────────────────────────────────────────────────


def on_npus(*rows: Row) -> Report:
    return Report("host", "today", "npu", "Ascend910B2", True, {"speed": list(rows)}, {"speed": 1.0})


def test_measured_rates_are_read_by_rehearse(tmp_path, capsys):
    rows = [
        Row("", "held", "", "", "flops", 2.5e14),
        Row("", "slower", "", "", "within", 9e10),
        Row("", "held", "", "", "within", 6e10),
    ]
    assert command.finish(on_npus(*rows), tmp_path, is_whole=True) == 0  # slower is not off
    assert "rates.yaml: make rehearse " in capsys.readouterr().out
    rates = read_rates(tmp_path / "rates.yaml", "npu")
    for found, assumed in ((rates.best, BEST), (rates.worst, WORST)):
        assert asdict(found) == asdict(assumed) | {"flops": 2.5e14, "within": 6e10}  # the lower of two
    assert rates.source == "flops, within measured on Ascend910B2; memory, between, copies, host assumed"
    whole = rates_text("npu", "Ascend910B2", asdict(Rates(1, 2, 3, 4, 5, 6)))
    (tmp_path / "rates.yaml").write_text(whole)
    assert read_rates(tmp_path / "rates.yaml", "npu") == RateRange(
        Rates(1, 2, 3, 4, 5, 6),
        Rates(1, 2, 3, 4, 5, 6),
        "flops, memory, within, between, copies, host measured on Ascend910B2",
    )


def test_rates_are_written_by_a_whole_run_on_npus_alone(tmp_path):
    report = on_npus(Row("", "held", "", "", "flops", 2.5e14))
    command.finish(report, tmp_path, is_whole=False)
    report.is_apart = False
    command.finish(report, tmp_path, is_whole=True)
    assert not (tmp_path / "rates.yaml").exists()


GOOD = {"kind": "npu", "device": "Ascend910B2", "flops": "2.5e+14 FLOP/s"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"flop": "1 FLOP/s"},
            "flop: no such rate; the names are kind, device, flops, memory, within, between, copies, host",
        ),
        ({"flops": "250 TFLOPS"}, r"flops: 250 TFLOPS: the unit must be FLOP/s, as in 3.54e\+14 FLOP/s"),
        ({"flops": "1e14"}, "the unit must be FLOP/s"),
        ({"host": "-1 s"}, "host: -1 s is not a number above 0"),
        ({"memory": "nan B/s"}, "not a number above 0"),
        ({"memory": "fast B/s"}, "not a number above 0"),
        ({"kind": "cpu", "device": "cpu"}, r"the rates of a cpu \(cpu\), not of an npu"),
        ({"kind": None}, "not a file of rates"),
        ({"flops": None}, "not a file of rates"),
    ],
)
def test_wrong_rates_are_refused(tmp_path, changes, message):
    lines = {name: value for name, value in (GOOD | changes).items() if value is not None}
    (tmp_path / "r.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    with pytest.raises(SettingError, match=message):
        read_rates(tmp_path / "r.yaml", "npu")


def test_missing_and_repeated_rates_are_refused(tmp_path):
    with pytest.raises(SettingError, match=r"none.yaml: no such file; make accept writes"):
        read_rates(tmp_path / "none.yaml", "npu")
    (tmp_path / "r.yaml").write_text("flops: 1 FLOP/s\nflops: 2 FLOP/s\n")
    with pytest.raises(SettingError, match="flops is there twice"):
        read_rates(tmp_path / "r.yaml", "npu")
