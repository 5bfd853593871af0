"""training.profile: a run under torch's profiler equals one without. For torch_npu's: tests/npu."""

import json

import pytest
import torch
import torch.distributed as dist
from training_runs import tensors, train

from qwen35.config.layout import check_layout
from qwen35.config.load import SettingError, load_settings
from qwen35.config.schema import ProfileSettings
from qwen35.device import HOST
from qwen35.training.metrics import read_metrics
from qwen35.training.profiler import Profile


def test_profiling_writes_a_trace_and_changes_no_number(workplace, two, tmp_path):
    """One rank of two: it writes a trace and a table, and the run's numbers stay the same."""
    save = tmp_path / "run"
    settings = ("profile.steps=2", "profile.start=3", "profile.ranks=[1]", "profile.memory_snapshot=true")
    done = train(workplace, save, 2, "training.save_interval=5", *(f"training.{setting}" for setting in settings))
    assert done.returncode == 0, done.stderr
    assert f"profile of steps 3 to 4 on ranks 1, allocations in the trace: {save}/profile/step_0000003\n" in done.stdout
    [folder] = (save / "profile").glob("*/*")
    assert str(folder.relative_to(save)) == "profile/step_0000003/rank_00001"
    assert sorted(path.name for path in folder.iterdir()) == ["operators.txt", "trace.json"]
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert sum(name == "Optimizer.step#AdamW.step" for name in names) == 2
    assert any(event["name"] == "[memory]" for event in events)
    text = (folder / "operators.txt").read_text()
    assert "Self CPU %" in text and " aten::mm " in text
    lines, wanted = (read_metrics(path / "metrics.jsonl") for path in (save, two))
    assert [line["loss"] for line in lines] == [line["loss"] for line in wanted]
    a, b = tensors(save), tensors(two)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["steps=2", "start=10"], "steps 10 to 11 are not all among the 10 of training.train_iters"),
        (["steps=1", "start=1"], "training.profile.start: 1 must be 2 or more"),
        (["ranks=[1]"], "training.profile means nothing without training.profile.steps"),
        (["steps=-1"], "training.profile.steps: -1 must be 0 or more"),
        (["steps=1", "ranks=[]"], "training.profile.ranks: [] must name at least one rank"),
        (["steps=1", "ranks=[0, -1]"], "training.profile.ranks[1]: -1 must be 0 or more"),
        (["steps=1", "folder=../x"], "training.profile.folder: ../x must be a folder below training.save"),
        (["steps=1", "folder=/x"], "training.profile.folder: /x must be a folder below training.save"),
        (["steps=1", "folder=."], "training.profile.folder: . must be a folder below training.save"),
        (["steps=1", "folder=iter_0000001"], "iter_0000001 must be a folder below training.save, and not a checkpoint"),
    ],
)
def test_settings_out_of_range_are_refused(workplace, overrides, words):
    with pytest.raises(SettingError) as caught:
        load_settings(workplace / "recipe.yaml", [f"training.profile.{override}" for override in overrides])
    assert words in str(caught.value)
    load_settings(workplace / "recipe.yaml", ["training.profile.steps=8"])


def test_a_rank_beyond_the_world_is_refused(workplace):
    settings = load_settings(workplace / "recipe.yaml", ["training.profile.steps=1", "training.profile.ranks=[0, 2]"])
    with pytest.raises(SettingError, match=r"training\.profile\.ranks: there is no rank 2 of 2"):
        check_layout(settings, 2)
    check_layout(settings, 3)


def test_other_ranks_write_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    profile = Profile(ProfileSettings(steps=2, ranks=(1,)), tmp_path, HOST)
    assert profile.plan(0) == f"profile of steps 3 to 4 on ranks 1: {tmp_path}/profile/step_0000003"
    assert profile.plan(2) == "no profile of steps 3 to 4: the run goes on after step 2"
    profile.before(2)
    assert not list(tmp_path.iterdir())
