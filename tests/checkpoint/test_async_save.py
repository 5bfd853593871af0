"""Background saves: their content, order and errors, what is kept, and kill -9 at any moment."""

import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from forked import process_of
from saver_run import BEGINS, INTERVAL, LIMIT, STEPS, Toy, adam, run, train_step
from training_runs import tensors

from qwen35.checkpoint import async_save
from qwen35.checkpoint.async_save import Saver
from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.checkpoint.dcp_folder import ITERATION, is_complete, keep_newest, newest_checkpoint
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.folders import remove_leftovers
from qwen35.checkpoint.slices import TensorSlice

PREFIXES = ("model.", "optimizer.")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {prefix + name: value for prefix in PREFIXES for name, value in tensors(folder, prefix).items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def steps_in(folder: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    return sorted(
        int(path.name[5:]) for path in folder.glob("iter_*") if ITERATION.fullmatch(path.name) and is_complete(path)
    )


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Holds writes in the background back until it is set."""
    event = threading.Event()
    write_shards = async_save.write_shards

    def wait_and_write(*args):
        assert event.wait(60)
        return write_shards(*args)

    monkeypatch.setattr(async_save, "write_shards", wait_and_write)
    return event


def toy(steps: int) -> tuple[Toy, torch.optim.Optimizer]:
    model = Toy()
    optimizer = adam(model)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def test_background_save_has_the_values_of_its_step(tmp_path, gate):
    """Training goes on before a byte is written, and the next save reuses the memory."""
    model, optimizer = toy(1)
    with Saver(tmp_path / "a", model, optimizer, background=True) as background:
        background.check()
        room = {name: values.data_ptr() for name, values in background._host_copies.items()}
        assert background.save(1, {"at": 1}, {"own": 1}) == 0.0
        for step in (1, 2):
            train_step(model, optimizer, step)
            background.check()
        assert not list((tmp_path / "a").glob("iter_*"))
        gate.set()
        background.finish()
        assert steps_in(tmp_path / "a") == [1]
        background.save(3, {"at": 3}, {"own": 3})
        assert {name: values.data_ptr() for name, values in background._host_copies.items()} == room
    assert steps_in(tmp_path / "a") == [1, 3]
    for step in (1, 3):
        wanted, states = toy(step)
        with Saver(tmp_path / f"{step}", wanted, states, background=False) as plain:
            plain.save(step, {"at": step}, {"own": step})
        assert_equal(state(tmp_path / "a" / f"iter_{step:07}"), state(tmp_path / f"{step}"))
        loaded = load_checkpoint(tmp_path / "a" / f"iter_{step:07}", wanted, states)
        assert (loaded.extra, loaded.rank_extra) == ({"at": step}, {"own": step})


def test_a_save_waits_for_the_one_before(tmp_path, gate, monkeypatch):
    """It returns how long it waited, and actions run in order."""
    model, optimizer = toy(1)
    done = []

    def wait(jobs):
        done.append("waits")
        gate.set()
        return wait_for(jobs)

    wait_for = async_save.wait
    with Saver(tmp_path, model, optimizer, background=True) as background:
        background.save(1, {}, {})
        background.run_after(lambda: done.append(steps_in(tmp_path)))
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(async_save, "wait", wait)
        assert background.save(2, {}, {}) > 0.0
        assert done == ["waits", [1]]
        background.run_after(lambda: done.append(steps_in(tmp_path)))
        assert background.finish() >= 0.0
        assert done[-1] == [1, 2]
        background.run_after(lambda: done.append("at once"))
        assert done[-1] == "at once"
        assert background.saves == 2
        assert background.stalled > 0.0
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("way", ["check", "save", "finish", "exit"])
def test_failed_background_save_stops_the_run(tmp_path, monkeypatch, way):
    """The error is the one of a save in the foreground; only the older checkpoint is left."""
    model, optimizer = toy(1)

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    def fail():
        with Saver(tmp_path, model, optimizer, background=True, limit=1) as background:
            background.save(1, {}, {})
            background.finish()
            monkeypatch.setattr(torch, "save", full)
            background.save(2, {}, {})
            if way == "check":
                async_save.wait(background._jobs)
                background.check()
            elif way == "save":
                background.save(3, {}, {})
            elif way == "finish":
                background.finish()

    with pytest.raises(CheckpointError, match=r"iter_0000002 cannot be written: No space left on device"):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert steps_in(tmp_path) == [1]


def test_failing_run_completes_its_background_save(tmp_path, gate):
    model, optimizer = toy(1)

    def fail():
        with Saver(tmp_path, model, optimizer, background=True) as background:
            background.save(1, {}, {})
            threading.Timer(0.05, gate.set).start()
            raise KeyError("a reason of its own")

    with pytest.raises(KeyError, match="a reason of its own"):
        fail()
    assert steps_in(tmp_path) == [1]


LOST = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:644")  # as gloo has it


@pytest.mark.parametrize(
    ("failure", "reason", "message"),
    [
        (CheckpointError("no space left"), KeyError("a reason of its own"), "error: no space left\n"),
        (LOST, KeyError("a reason of its own"), ""),
        (CheckpointError("no space left"), LOST, ""),  # the other rank has found the same error first
    ],
)
def test_failing_run_reports_its_background_save_unless_a_rank_was_lost(
    tmp_path, capsys, monkeypatch, failure, reason, message
):
    model, optimizer = toy(1)

    def fail(*args):
        raise failure

    def run():
        with Saver(tmp_path, model, optimizer, background=True) as background:
            background.save(1, {}, {})
            raise reason

    monkeypatch.setattr(async_save, "write_shards", fail)
    with pytest.raises(type(reason)) as caught:
        run()
    assert caught.value is reason
    assert capsys.readouterr().err == message


# -- which checkpoints are kept --------------------------------------------------------------------


def test_newest_checkpoints_are_kept(tmp_path):
    model, optimizer = toy(1)
    with Saver(tmp_path, model, optimizer, background=False) as plain:
        for step in (1, 2, 3, 4, 5):
            plain.save(step, {}, {})
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "mine").touch()
    (tmp_path / "iter_0000002" / "complete.json").unlink()  # incomplete: neither counted nor removed
    source = DCPSource(tmp_path / "iter_0000003")
    with Saver(tmp_path, model, optimizer, background=True, limit=2) as background:
        background.save(6, {}, {})
        background.finish()
        assert steps_in(tmp_path) == [3, 5, 6]  # the third is being read
        assert source.read("late", TensorSlice.full(model.late.shape)).equal(model.late)
        del source
        background.save(7, {}, {})
    assert steps_in(tmp_path) == [6, 7]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["iter_0000002", "iter_0000006", "iter_0000007", "latest_checkpointed_iteration.txt", "release"]
    keep_newest(tmp_path, 1)
    assert steps_in(tmp_path) == [7]


def test_old_checkpoint_is_removed_after_the_new_one_is_complete(tmp_path, monkeypatch):
    model, optimizer = toy(1)
    seen = []

    def looking(folder, limit):
        seen.append(steps_in(folder))
        keep_newest(folder, limit)

    monkeypatch.setattr(async_save, "keep_newest", looking)
    with Saver(tmp_path, model, optimizer, background=True, limit=1) as background:
        for step in (1, 2, 3):
            background.save(step, {}, {})
    assert seen == [[1], [1, 2], [2, 3]]
    assert steps_in(tmp_path) == [3]


def test_failure_to_remove_old_checkpoints_is_one_line(tmp_path, monkeypatch):
    model, optimizer = toy(1)

    def denied(path):
        raise PermissionError(13, os.strerror(13))

    with Saver(tmp_path, model, optimizer, background=False, limit=1) as plain:
        plain.save(1, {}, {})
        monkeypatch.setattr("qwen35.checkpoint.folders.shutil.rmtree", denied)
        with pytest.raises(CheckpointError, match="older checkpoints cannot be removed: Permission denied"):
            plain.save(2, {}, {})
    assert newest_checkpoint(tmp_path).name == "iter_0000002"


# -- kill -9 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("saver") / "run"
    assert start(folder, False) == 0
    return state(folder)


def start(folder: Path, *args) -> int:
    process = process_of(run, folder, *args)
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def log(folder: Path, word: str) -> list[int]:
    lines = [json.loads(line) for line in folder.with_suffix(".log").read_text().splitlines()]
    return [line[word] for line in lines if word in line]


def test_run_resumes_after_twenty_kills_at_random_moments(uninterrupted, tmp_path):
    """Killed anywhere, the run resumes from the last complete checkpoint."""
    folder, moments, newest, begun = tmp_path / "run", random.Random(7), 0, 0
    for kill in range(20):
        background = kill % 2 == 0
        code = start(folder, background, moments.randrange(1, 120))
        assert code == -signal.SIGKILL
        assert log(folder, "start") == [newest]  # exactly what the killed run had left
        saves = [newest, *log(folder, "begun")]
        there = steps_in(folder)
        newest = there[-1] if there else 0
        # at least the last save that was begun (in the background: the one before it, which it
        # has waited for), at most one save more
        assert newest >= (saves[-2] if background and len(saves) > 1 else saves[-1])
        assert newest <= saves[-1] + INTERVAL
        begun += len(saves) - 1
    assert begun > 10 and 20 < newest < STEPS
    assert start(folder, True) == 0
    assert log(folder, "start") == [newest]
    assert_equal(state(folder), uninterrupted)
    assert steps_in(folder) == [STEPS - INTERVAL, STEPS]
    assert len([path for path in folder.iterdir() if path.is_dir()]) == LIMIT  # no leftovers


# moment -> audit event, end of its path, step to resume from
MOMENTS = {
    "before the first byte": ("open", "iter_0000012.tmp/__0_0.distcp", 9),
    "after the tensors": ("os.rename", "iter_0000012.tmp/.metadata.tmp", 9),
    "before the manifest": ("os.rename", "iter_0000012.tmp/complete.json.new", 9),
    "before the rename": ("os.rename", "iter_0000012.tmp", 9),
    "before the latest file": ("os.rename", "latest_checkpointed_iteration.txt.new", 3),
    "before an older one is removed": ("os.rename", "iter_0000006", 12),
    "an older one is half removed": ("shutil.rmtree", "iter_0000006.gone", 12),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_run_resumes_after_kill_9_in_a_background_save(uninterrupted, tmp_path, moment):
    event, path, left = MOMENTS[moment]
    folder = tmp_path / "run"
    assert start(folder, True, None, (event, path)) == -signal.SIGKILL
    assert steps_in(folder)[-1] == left
    assert start(folder, True) == 0
    assert log(folder, "start") == [left]
    assert_equal(state(folder), uninterrupted)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == LIMIT


def test_first_gradient_after_a_resume_creates_optimizer_state(uninterrupted, tmp_path):
    """A tensor without a gradient has no optimizer state in the checkpoint, but gets it later."""
    folder = tmp_path / "run"
    assert start(folder, True, None, ("open", "iter_0000012.tmp/__0_0.distcp")) == -signal.SIGKILL
    assert BEGINS > 9
    assert "exp_avg.late" not in DCPSource(newest_checkpoint(folder), "optimizer.").specs
    assert start(folder, True) == 0
    assert state(folder)["optimizer.step.late"] == STEPS - BEGINS
    assert_equal(state(folder), uninterrupted)


def test_unfrozen_parameter_is_trained_after_a_resume(tmp_path):
    model, optimizer = toy(2)
    with Saver(tmp_path, model, optimizer, background=True) as background:
        background.save(2, {}, {})
    other = Toy()
    other.frozen.requires_grad_(True)
    states = adam(other)
    load_checkpoint(tmp_path, other, states)
    assert other.frozen not in states.state
    other.frozen.sum().backward()
    train_step(other, states, 2)
    train_step(model, optimizer, 2)
    assert states.state[other.frozen]["step"] == 1
    assert not torch.equal(other.frozen, model.frozen)
    assert torch.equal(other.first.weight, model.first.weight)


def test_half_removed_checkpoint_is_cleaned_up(tmp_path):
    (tmp_path / "iter_0000003.gone").mkdir()
    (tmp_path / "iter_0000003.gone" / "x").touch()
    (tmp_path / "thesis.gone").mkdir()
    assert remove_leftovers(tmp_path, ITERATION) == []
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.gone"]
