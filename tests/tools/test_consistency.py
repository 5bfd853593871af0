"""What must agree on all nodes of a run: facts, differences, the shared save folder, clocks."""

import contextlib
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import spawn
from ports import free_port
from safetensors.torch import save_file

from qwen35.checkpoint.dcp_folder import MANIFEST, METADATA, manifest_content
from qwen35.config.load import load_settings
from qwen35.log import set_up_logging
from qwen35.tools import consistency
from qwen35.tools.consistency import NodesError, compare_nodes, disagreements, facts, marker_file, sees_marker, sources

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
    for name, text in {
        "m/config.json": "{}",
        "m/w.safetensors": "w" * 200_000,
        "a.json": "[1]",
        "b.json": "[2]",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "dcp/release").mkdir(parents=True)
    (tmp_path / "dcp/release/__0_0.distcp").write_text("x")
    (tmp_path / "dcp/release" / METADATA).write_text("x")
    (tmp_path / "dcp/release" / MANIFEST).write_text(json.dumps(manifest_content(tmp_path / "dcp/release", None)))
    overrides = {
        "data.dataset_param.basic_parameters.dataset": f"{tmp_path}/a.json, {tmp_path}/b.json",
        "model.model_name_or_path": tmp_path / "m",
        "training.load": tmp_path / "dcp",
        "training.train_iters": 1,
        "training.save": tmp_path / "runs/save",
    }
    return lambda *more: load_settings(ROOT / "configs/tiny.yaml", [*(f"{k}={v}" for k, v in overrides.items()), *more])


def test_settings_and_variables_of_one_node_may_differ(recipe):
    environment = {"HCCL_BUFFSIZE": "200", "PATH": "/bin"}
    cache = "data.dataset_param.basic_parameters.cache_dir=/tmp/other"
    found = facts(recipe(), environment)
    own = {"HCCL_IF_IP": "10.0.0.2", "HCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1", "PATH": "/usr/bin"}
    assert not disagreements({0: found, 1: facts(recipe(cache), environment | own)}, 8)
    assert found["HCCL_BUFFSIZE"] == "200"
    assert re.fullmatch(r"2\.\d+\.\d+", found["torch"]) and found["CANN"] == "none"


def change(name: str, text: str, at: int) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = (folder / name).read_text()
        (folder / name).write_text(content[:at] + text + content[at + len(text) :])

    return act


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (change("b.json", "3", 1), "b.json"),
        (change("m/config.json", "[]", 0), "m/config.json"),
        (change("m/w.safetensors", "v", 0), "m/w.safetensors"),
        (change("m/w.safetensors", "v", 100_000), "m/w.safetensors"),
        (change("m/w.safetensors", "v", 199_999), "m/w.safetensors"),
        (change("dcp/release/__0_0.distcp", "y", 0), "dcp/release/__0_0.distcp"),
        (lambda folder: (folder / "a.json").unlink(), "a.json"),
        (lambda folder: (folder / "dcp/release" / MANIFEST).unlink(), "dcp/release/"),
    ],
)
def test_a_different_file_is_found(recipe, tmp_path, act, named):
    before = facts(recipe(), {})
    act(tmp_path)
    found = disagreements({0: before, 1: facts(recipe(), {})}, 8)
    assert any(line.startswith(f"node 1 (rank 8) has {tmp_path}/{named}: ") for line in found), found


def test_fine_tunings_of_one_model_are_told_apart(tmp_path, monkeypatch):
    """As after adapters were merged: one of many tensors differs, and neither end of the file."""
    monkeypatch.setattr(consistency, "WHOLE_BYTES", 0, raising=False)
    weights = {f"layers.{i:02}": torch.full((40, 1024), float(i)) for i in range(20)}
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    before = consistency.fingerprint(file)
    for name in ("layers.07", "layers.12"):
        save_file(weights | {name: weights[name] + 1e-3}, file)
        assert consistency.fingerprint(file) != before
    save_file(weights, file)
    assert consistency.fingerprint(file) == before


@pytest.mark.parametrize(
    ("settings", "environment", "named"),
    [
        ("training.lr=0.5", {}, "node 1 (rank 8) has training.lr: 0.5; node 0 (rank 0): 0.0"),
        ("training.seed=1", {"HCCL_DETERMINISTIC": "true"}, "node 1 (rank 8) has HCCL_DETERMINISTIC: true; node 0 "),
        ("training.seed=1", {"ASCEND_HOME_PATH": "cann"}, "node 1 (rank 8) has CANN: 8.5.0; node 0 (rank 0): none"),
    ],
)
def test_a_different_setting_is_found(recipe, tmp_path, monkeypatch, settings, environment, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cann/runtime").mkdir(parents=True)
    (tmp_path / "cann/runtime/version.info").write_text("Version=8.5.0\n")
    found = disagreements({0: facts(recipe(), {}), 1: facts(recipe(settings), environment)}, 8)
    assert any(line.startswith(named) for line in found), found


def test_different_code_is_found(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/a.py").write_text("1")
    before = sources(tmp_path)
    (tmp_path / "kernels/a.py").write_text("2")
    assert sources(tmp_path) != before


def test_a_marker_file_that_appears_late_is_seen(tmp_path, monkeypatch):
    """As on a network file system, which caches listings."""
    looks = []
    real = Path.iterdir

    def iterdir(path):
        looks.append(path)
        return iter(()) if len(looks) < 7 else real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr("qwen35.tools.consistency.time.sleep", lambda _: None)
    with marker_file(tmp_path / "runs") as marker:
        assert sees_marker(tmp_path / "runs", marker)
        assert [path.name for path in real(tmp_path / "runs")] == [marker]
    assert not list(real(tmp_path))


def test_a_save_folder_in_use_is_not_removed(tmp_path):
    with marker_file(tmp_path / "runs"):
        (tmp_path / "runs/metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["metrics.jsonl"]


# -- real ranks ------------------------------------------------------------------------------------

HERE = {"torch": "2.7.1", "training.lr": "1e-05", "data/a.json": "10 bytes (aa)"}
FASTER = HERE | {"training.lr": "2e-05"}
WITHOUT = {"torch": "2.7.1", "training.lr": "1e-05"}
CASES = {  # name -> by rank, what it has instead of the facts, clock and save folder of all
    "the same": [{}, {}, {}, {}],
    "other facts": [{"facts": facts} for facts in (HERE, FASTER, WITHOUT, FASTER)],
    "an unreadable file": [{}, {"error": PermissionError(13, "Permission denied", "data/a.json")}, {}, {}],
    "another folder": [{}, {}, {"save": "there"}, {}],
    "clocks": [{}, {"ahead": 75}, {"ahead": -3600}, {"ahead": 1}],
}


def _rank(rank: int, port: int, folder: Path) -> None:
    """Compares in each case, one rank a node, and leaves in a file what it printed and the end."""
    store = dist.TCPStore("127.0.0.1", port, 4, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    set_up_logging(rank)
    consistency.FILE_TIMEOUT, real = 0.2, time.time
    for case, values in CASES.items():
        own = values[rank]

        def read(settings: object, own: dict = own) -> dict[str, str]:
            if error := own.get("error"):
                raise error
            return own.get("facts", HERE)

        consistency.facts, consistency.time.time = read, lambda own=own: real() + own.get("ahead", 0)
        save = folder / own.get("save", "runs/save")
        settings = load_settings(ROOT / "configs/tiny.yaml", [f"training.save={save}"])
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            try:
                compare_nodes(settings, 60)
                end = "agreed"
            except NodesError as error:
                end = str(error)
        dist.barrier()
        assert not (folder / "runs").exists()  # which the marker file needed
        (folder / f"{case} {rank}").write_text(f"{out.getvalue()}{end}")
        dist.barrier()
    dist.destroy_process_group()


def test_ranks_compare_their_nodes(tmp_path):
    spawn(_rank, free_port(), tmp_path, ranks=4)
    lines = {case: [(tmp_path / f"{case} {rank}").read_text().splitlines() for rank in range(4)] for case in CASES}
    assert lines["the same"] == [["agreed"]] * 4
    lr = "nodes 1, 3 (ranks 1, 3) have training.lr: 2e-05; node 0 (rank 0): 1e-05"
    data = "node 2 (rank 2) has data/a.json: none; node 0 (rank 0): 10 bytes (aa)"
    assert lines["other facts"] == [
        [lr, data, "the nodes differ in 2 things, listed above: nothing was loaded"]
    ] * 4  # fmt: skip
    assert lines["an unreadable file"] == [["node 1: data/a.json: Permission denied"]] * 4
    for [end] in lines["another folder"]:
        assert end.startswith("node 2 does not see what node 0 writes in ")
        assert "name a training.save on a file system that all nodes share" in end
    (ahead, behind, end), *others = lines["clocks"]  # reported, never refused, and a second is nothing
    assert re.search("note: the clock of node 1 is 7[3-7] s ahead of node 0's", ahead)
    assert re.search("note: the clock of node 2 is (359[5-9]|360[0-5]) s behind node 0's", behind)
    assert (end, others) == ("agreed", [["agreed"]] * 3)
