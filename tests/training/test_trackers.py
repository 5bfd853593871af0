"""What trackers are told at a start, by stand-ins for their packages; tests/trackers has these."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen35.config.load import load_settings
from qwen35.training.trackers import open_trackers


@pytest.fixture
def told(monkeypatch) -> dict[str, dict[str, Any]]:
    """Package -> what its init got."""
    found: dict[str, dict[str, Any]] = {}
    for package in ("wandb", "swanlab"):

        def init(package: str = package, **given: Any) -> SimpleNamespace:
            found[package] = given
            return SimpleNamespace(define_metric=lambda *names, **options: None)

        module = SimpleNamespace(init=init, Settings=lambda **options: options)
        monkeypatch.setitem(sys.modules, package, module)
        for name in ("NAME", "PROJECT", "DIR", "RUN_ID", "EXP_NAME", "PROJ_NAME"):
            monkeypatch.delenv(f"{package.upper()}_{name}", raising=False)
    return found


def start(workplace: Path, folder: Path, done: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    overrides = ["training.report_to=[wandb, swanlab]", f"training.save={folder}"]
    open_trackers(load_settings(workplace / "recipe.yaml", overrides), folder, done)


def test_without_variables_a_run_is_called_like_its_folder(workplace, tmp_path, told):
    start(workplace, tmp_path / "mine")
    wandb, swanlab = told["wandb"], told["swanlab"]
    assert (wandb["name"], wandb["project"], wandb["dir"]) == ("mine", "qwen35", str(tmp_path / "mine"))
    assert (swanlab["experiment_name"], swanlab["project"]) == ("mine", "qwen35")


def test_variables_of_a_tracker_come_first(workplace, tmp_path, told, monkeypatch):
    """An argument of init would win over the variable without a word, so it must not be given."""
    for name in ("WANDB_NAME", "WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, "other")
    for name in ("SWANLAB_EXP_NAME", "SWANLAB_PROJ_NAME", "SWANLAB_RUN_ID"):
        monkeypatch.setenv(name, "other")
    start(workplace, tmp_path / "mine")
    assert not {"name", "project", "dir"} & told["wandb"].keys() and told["wandb"]["id"] == "other"
    assert {told["swanlab"][name] for name in ("experiment_name", "project", "id")} == {"other"}
    start(workplace, tmp_path / "mine", done=3)
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    start(workplace, tmp_path / "mine", done=3)
    assert told["wandb"]["id"] == "other"  # a run that resumes goes on in its page


def test_a_copied_run_says_whose_pages_it_goes_on_in(workplace, tmp_path, told, caplog):
    start(workplace, tmp_path / "a")
    first = told["wandb"]["id"]
    start(workplace, tmp_path / "a", done=3)
    assert told["wandb"]["id"] == first and not caplog.text
    (tmp_path / "b").mkdir()
    (tmp_path / "b/trackers.json").write_bytes((tmp_path / "a/trackers.json").read_bytes())
    start(workplace, tmp_path / "b", done=3)
    assert told["wandb"]["id"] == first
    line = f"{tmp_path}/b/trackers.json: the run goes on in the pages that {tmp_path}/a began; remove the file"
    assert line in caplog.text
    ids = json.loads((tmp_path / "a/trackers.json").read_text())
    (tmp_path / "a/trackers.json").write_text(json.dumps({name: ids[name] for name in ("wandb", "swanlab")}))
    caplog.clear()
    start(workplace, tmp_path / "a", done=3)  # of before, which does not say
    assert told["wandb"]["id"] == first and not caplog.text
