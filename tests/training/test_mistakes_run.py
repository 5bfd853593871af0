"""Mistakes around a run: full disks, taken ports, addresses and devices that are not there."""

import json
import re
import resource
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mistakes import (
    BASIC,
    CONVERT,
    DATA,
    EXPORT,
    TRAIN,
    Case,
    check,
    contents,
    launch,
    parametrized,
    place,
    run,
    whole,
)

from qwen35.device import check_device_count, init_process
from qwen35.errors import SettingError
from qwen35.training.plots import Curves, draw_loss

__all__ = ["place", "whole"]  # fixtures

# -- a full disk: files have at most so many bytes ------------------------------------------------


FULL = [  # name, command, bytes, words, what may be left: files that are whole
    ("lock", TRAIN, 0, "run/.lock: cannot be written: File too large", ()),
    ("settings", TRAIN, 200, "run/config.yaml: File too large", ()),
    (
        "metrics",
        (*TRAIN, "training.train_iters=20"),
        8000,
        "run/metrics.jsonl: File too large",
        ("run", "run/.lock", "run/config.yaml", "run/metrics.jsonl", "run/run.json", "run/train.log"),
    ),
    (
        "checkpoint",
        TRAIN,
        40_000,
        "run/iter_0000001 cannot be written: File too large",
        ("run", "run/.lock", "run/config.yaml", "run/metrics.jsonl", "run/run.json", "run/train.log"),
    ),
    ("cache", (*TRAIN, f"{BASIC}.cache_dir=cache"), 1000, f"{BASIC}.cache_dir: cache/", ()),
    ("converted", CONVERT, 300, "new/release cannot be written: File too large", ()),
    ("converted, later", CONVERT, 100_000, "new/release cannot be written: File too large", ()),
    ("exported", EXPORT, 100_000, "cannot be written: File too large", ()),
    ("small files of the export", EXPORT, 0, "cannot be written: File too large", ()),
    ("records", (*DATA, "--workers", "1"), 1000, "out/a.json: cannot be written: File too large", ()),
    (  # torch 2.7 itself writes 2.4 kB as it is imported, which is more than the settings are
        "under the launcher",
        (),
        8000,
        "run/metrics.jsonl: File too large",
        ("run", "run/.lock", "run/config.yaml", "run/metrics.jsonl", "run/run.json", "run/train.log"),
    ),
]


@pytest.mark.parametrize(("command", "size", "words", "left"), [row[1:] for row in FULL], ids=[row[0] for row in FULL])
def test_a_full_disk_is_one_line(place, command, size, words, left):
    before = contents(place)
    done = run(place, *(command or (*launch(1), "training.train_iters=20")), file_size=size)
    assert (done.code, done.err.count("\n")) == (1, 1), done.err
    assert words in done.err
    after = contents(place)
    assert set(after) - set(before) == set(left) and before.items() <= after.items()
    if "run/metrics.jsonl" in left:
        lines = (place / "run/metrics.jsonl").read_text().splitlines(keepends=True)
        assert lines and all(line.endswith("\n") and json.loads(line)["step"] for line in lines)


def test_a_full_disk_keeps_the_last_plot(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1}\n')
    draw_loss(Curves.read(tmp_path), tmp_path)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*loss\.png"):
            draw_loss(Curves.read(tmp_path), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


# -- rendezvous and devices ------------------------------------------------------------------------

CASES = [
    Case("save is a file", (*TRAIN, "training.save=r.yaml"), ("r.yaml cannot be used: File exists",)),
    Case("save below a file", (*TRAIN, "training.save=r.yaml/run"), ("r.yaml/run cannot be used: Not a directory",)),
    Case(
        "more sharers than processes",
        (*TRAIN, "parallel.fully_shard_parallel_size=3"),
        ("does not divide the 1 processes",),
    ),
    Case(
        "unknown kernel", (*TRAIN, "model.kernels.swiglu=fused"), ("model.kernels.swiglu: 'fused' is not one of auto",)
    ),
    Case("unknown op", (*TRAIN, "model.kernels.swish=native"), ("no op is named swish",)),
    Case("freezes nothing", (*TRAIN, "model.freeze=[model.vision]"), ("model.freeze: model.vision matches no module",)),
    Case("freezes all", (*TRAIN, "model.freeze=['*']"), ("model.freeze: * leave nothing to train",)),
    Case(
        "small bucket", (*TRAIN, "data.dataloader_param.patch_bucket=3"), ("patch_bucket: 3 must be a multiple of 4",)
    ),
    Case(
        "no such machine",
        ("launch", "--master_addr", "no-such-machine.invalid", "r.yaml"),
        ("MASTER_ADDR=no-such-machine.invalid: no host of that name",),
    ),
    Case(
        "mistake of a rank", (*launch(2), "model.freeze=[model.vision]"), ("error: model.freeze: model.vision matches",)
    ),
]


@parametrized(CASES)
def test_a_mistake_is_one_line(place, case):
    check(place, case)


@pytest.fixture
def taken():
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_in_use_is_refused(place, taken):
    command = ("launch", "--master_port", str(taken), "r.yaml")
    check(
        place, Case("", command, (f"MASTER_PORT={taken} cannot be used", "in use", f"MASTER_PORT={taken % 65535 + 1}"))
    )


@pytest.mark.parametrize("more", [{}, {"LOCAL_WORLD_SIZE": "1"}], ids=["of several machines", "of one"])
def test_a_port_taken_after_the_check_is_named(place, taken, more):
    """The port was free when the launcher looked."""
    before = contents(place)
    meeting = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(taken)}
    done = run(place, *TRAIN, environment=meeting | more)
    assert done.code == 1 and contents(place) == before
    assert f"error: MASTER_ADDR=localhost MASTER_PORT={taken}: " in done.err
    assert "Traceback" not in done.err


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    with pytest.raises(SettingError) as caught:
        check_device_count("npu", 2)
    assert str(caught.value) == (
        "4 processes on this node, but 2 npu devices visible (ASCEND_RT_VISIBLE_DEVICES=0,1); set NPUS_PER_NODE=2,"
        " or make more devices visible"
    )
    check_device_count("npu", 4)
    check_device_count("cpu", 1)  # more processes than cores are slow, and no mistake
    stand_in = SimpleNamespace(is_available=lambda: True, device_count=lambda: 3)
    monkeypatch.setattr(torch, "npu", stand_in, raising=False)
    with pytest.raises(SettingError, match="4 processes on this node, but 3 npu devices visible"):
        init_process()


def test_the_list_that_a_message_names_outlives_the_launcher(place):
    """Which removes the TMPDIR of its ranks."""
    config = json.loads((place / "hf/config.json").read_text())
    text = config["text_config"]
    config["text_config"] = text | {"num_hidden_layers": 4, "layer_types": text["layer_types"] * 2}
    (place / "hf/config.json").write_text(json.dumps(config))
    done = run(place, *launch(1), "training.load=null", "training.init_from_hf_path=hf")
    [name] = re.findall(r"; all of them: (\S+)", done.err)
    assert done.code == 1 and Path(name).read_text().count("missing: ") > 3
    Path(name).unlink()


def test_a_cpu_takes_any_number_of_processes(place):
    done = run(place, *launch(3), "training.train_iters=1")
    assert (done.code, done.err) == (0, "")
    assert "3 processes on" in done.out and (place / "run/iter_0000001").is_dir()
