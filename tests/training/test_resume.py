"""Resuming: runs that are killed or stopped at any moment against one that never stopped."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import kills
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import as_before, save_checkpoint
from forked import Forked, ran, run_code
from training_runs import RECIPE, SAVES, STEPS, assert_same_run, start_training, tensors, train

from qwen35.checkpoint.dcp import CheckpointInfo, decode, encode, read_info
from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.folders import INCOMPLETE, remove_leftovers
from qwen35.checkpoint.lock import holding
from qwen35.config.load import SettingError, load_settings
from qwen35.config.schema import TrainingSettings
from qwen35.device import HOST
from qwen35.errors import UserError
from qwen35.model import load_config
from qwen35.model.config import ConfigError, check_same
from qwen35.training.metrics import read_metrics
from qwen35.training.resume import (
    check_disk,
    check_extra,
    check_place,
    restore_rng,
    rng_states,
    sequences_per_step,
)


@pytest.fixture(scope="module")
def uninterrupted(workplace) -> Path:
    save = workplace / "uninterrupted"
    done = train(workplace, save, 2, *RECIPE)
    assert done.returncode == 0, done.stderr
    return save


def wait_for(condition, process: Forked, seconds: float = 300.0):
    """The condition's value once it is true; None if the process ends first."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        if process.poll() is not None:
            return None
        time.sleep(0.005)
    return found


def kill_all(process: Forked) -> None:
    """kill -9 of the launcher alone: everything it started must end by itself."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(started, timeout=300)
    assert not alive


# read by python when it starts: the first rank that comes to the moment says so, and waits there
STAND_STILL = """
import sys, time, pathlib
here, go_on = pathlib.Path({folder!r}, "here"), pathlib.Path({folder!r}, "go_on")
def hook(event, args):
    if event == {event!r} and str(args[0]).endswith({path!r}) and not here.exists():
        here.touch()
        while not go_on.exists():
            time.sleep(0.02)
sys.addaudithook(hook)
"""


def start_and_wait(workplace: Path, save: Path, event: str, path: str, *overrides: str) -> Forked:
    """Train until Python audits this event on this file."""
    folder = save.with_name("moment")
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STAND_STILL.format(event=event, path=path, folder=str(folder)))
    process = start_training(workplace, save, 2, *overrides, PYTHONPATH=str(folder))
    assert wait_for((folder / "here").exists, process), process.communicate()
    assert len(psutil.Process(process.pid).children(recursive=True)) >= 2
    return process


def finish(workplace: Path, save: Path) -> str:
    done = train(workplace, save, 2, *RECIPE)
    assert done.returncode == 0, done.stderr
    assert not list(save.glob("*.tmp"))
    return done.stdout


def test_a_run_killed_at_any_moment_resumes_bit_for_bit(workplace, tmp_path):
    """The same command goes on from the last complete checkpoint; kills.py tries more moments."""
    done = train(workplace, tmp_path / "reference", 2, *kills.RECIPE)
    assert done.returncode == 0, done.stderr
    series = kills.Series(workplace, {2: tmp_path / "reference"}, seed=5)
    trainings = 0
    while series.kills < 4:  # one may do without what was killed, and come to its end before the next moment
        series.training(2, ["the start", "a step", "a save", "a removal", "the end"], tmp_path / f"run{trainings}")
        trainings += 1


# what a file's event says, and the iteration that may be gone on from
MOMENTS = {
    "nothing of rank 1's is written": ("open", "iter_0000008.tmp/__1_0.distcp", 4),
    "all tensors are": ("os.rename", "iter_0000008.tmp/.metadata.tmp", 4),
    "the marker is not": ("os.rename", "iter_0000008.tmp/complete.json.new", 4),
    "all but its name is": ("os.rename", "iter_0000008.tmp", 4),
    "it is whole and not the latest": ("os.rename", "latest_checkpointed_iteration.txt.new", 8),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_during_a_save_resumes_bit_for_bit(workplace, uninterrupted, tmp_path, moment):
    """A later save, so there is a checkpoint already; a half-written one is never chosen."""
    event, path, left = MOMENTS[moment]
    save = tmp_path / "run"
    shutil.copytree(uninterrupted, save)
    for folder in save.glob("iter_*"):
        if int(folder.name[5:]) > 4:
            shutil.rmtree(folder)
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    process = start_and_wait(workplace, save, event, path, *RECIPE)
    kill_all(process)
    assert list(save.glob("*.tmp")) or left == 8
    assert int(newest_checkpoint(save).name[5:]) == left
    assert f"steps {left + 1} to {STEPS}" in finish(workplace, save)
    assert_same_run(save, uninterrupted)


def test_a_loader_killed_during_the_last_save_does_no_harm(workplace, uninterrupted, tmp_path):
    """The loader has ended by then: it must not cost the last steps."""
    save = tmp_path / "run"
    process = start_and_wait(workplace, save, "os.rename", f"iter_{STEPS:07}.tmp/.metadata.tmp", *RECIPE)
    ranks = psutil.Process(process.pid).children()
    workers = [worker for rank in ranks for worker in rank.children()]
    for worker in workers:
        worker.kill()
    (tmp_path / "moment" / "go_on").touch()
    assert process.communicate(timeout=300)[1] == ""
    assert (process.returncode, workers) == (0, [])
    assert_same_run(save, uninterrupted)


def test_a_finished_run_is_tidied_up(workplace, uninterrupted, tmp_path):
    """Stopped right after the last rename: the latest step is named, old checkpoints go."""
    save = tmp_path / "run"
    shutil.copytree(uninterrupted, save)
    recipe = save / "config.yaml"
    recipe.write_text(recipe.read_text().replace(str(uninterrupted), str(save)))
    (save / "latest_checkpointed_iteration.txt").write_text("8")
    done = train(workplace, save, 2, *RECIPE, "training.save_total_limit=2")
    assert done.returncode == 0, done.stderr
    assert "latest_checkpointed_iteration.txt now names iter_0000012" in done.stdout
    assert "nothing left to train" in done.stdout
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "12"
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000008", "iter_0000012"]


def test_an_incomplete_newest_checkpoint_is_passed_over(workplace, uninterrupted, tmp_path):
    """The log names it, the reason and the checkpoint taken; it is kept; the run ends the same."""
    save = tmp_path / "run"
    shutil.copytree(uninterrupted, save)
    file = save / "iter_0000012/__1_0.distcp"
    os.truncate(file, 1000)
    out = finish(workplace, save)
    assert f"{file.parent} is incomplete ({file}: 1000 bytes, complete.json says " in out
    assert f": renamed to iter_0000012.damaged, and the run goes on from {save}/iter_0000008" in out
    assert f"steps 9 to {STEPS}" in out
    assert (save / "iter_0000012.damaged/__1_0.distcp").stat().st_size == 1000
    assert_same_run(save, uninterrupted)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def extras(checkpoint: Path, name: str, **changes) -> None:
    """Change values of an extra file in a checkpoint without checksums; None removes a value."""
    content = json.loads((checkpoint / name).read_text()) | encode(changes)
    (checkpoint / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    as_before(checkpoint)


WRONG_EXTRAS = {
    "no bins a step": (lambda c: extras(c, "extra.json", bins_a_step=None), "extra.json: does not hold bins_a_step"),
    "bins a step": (lambda c: extras(c, "extra.json", bins_a_step=True), "extra.json: does not hold bins_a_step"),
    "other bins": (lambda c: extras(c, "extra.json", bins_a_step=3), "was trained with 3 packed sequences per step"),
    "no data": (lambda c: extras(c, "extra.json", data=None), "extra.json: does not hold data"),
    "model": (lambda c: extras(c, "extra.json", model=[1]), "extra.json: does not hold model"),
    "unfilled": (lambda c: extras(c, "extra.json", unfilled_steps="x"), "extra.json: does not hold unfilled_steps"),
    "a list": (lambda c: ((c / "extra.json").write_text("[1]"), as_before(c)), "extra.json: is damaged"),
    "no JSON": (lambda c: ((c / "rank_00000.json").write_text("{"), as_before(c)), "rank_00000.json: is damaged"),
    "python": (lambda c: extras(c, "rank_00000.json", python=1), "rank_00000.json: does not hold the random states"),
    "numpy": (
        lambda c: extras(c, "rank_00000.json", numpy=("a", 1)),
        "rank_00000.json: does not hold the random states",
    ),
    "torch": (
        lambda c: extras(c, "rank_00000.json", torch=torch.zeros(3)),
        "rank_00000.json: does not hold the random",
    ),
    "device": (lambda c: extras(c, "rank_00000.json", torch=None), "rank_00000.json: does not hold the random states"),
    "no random states": (lambda c: ((c / "rank_00000.json").unlink(), as_before(c)), "rank_00000.json: is missing"),
    "no extras": (lambda c: ((c / "extra.json").unlink(), as_before(c)), "extra.json: is missing"),
}


def test_changed_settings_are_named_in_another_save_folder_too(workplace, uninterrupted, tmp_path):
    """The new folder has no config.yaml yet, so the checkpoint's counts."""
    steps, lr = f"training.train_iters={STEPS + 1}", "training.lr=0.002"
    from_there = (f"training.load={uninterrupted}", "training.init_from_hf_path=null")
    done = train(workplace, tmp_path / "run", 2, *RECIPE, *from_there, steps, lr)
    assert done.returncode == 0, done.stderr
    assert "settings changed since the checkpoint: " in done.stdout and "training.lr: 0.01 -> 0.002; " in done.stdout
    assert (
        "preprocessor_config.json: not read: size {'longest_edge': 16777216, 'shortest_edge': 65536}; pre"
        in done.stdout
    )


def test_loading_a_run_without_steps_left_is_refused(workplace, uninterrupted, tmp_path):
    """It would train nothing and save nothing."""
    from_there = (f"training.load={uninterrupted}", "training.init_from_hf_path=null")
    done = train(workplace, tmp_path / "run", 2, *RECIPE, *from_there)
    assert done.returncode == 1 and not list((tmp_path / "run").glob("iter_*"))
    assert done.stderr.startswith(
        f"error: training.load: {uninterrupted} has done {STEPS} steps, and training.train_iters is"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", WRONG_EXTRAS)
def test_damaged_extra_data_is_one_line(workplace, tmp_path, alone, kind):
    break_it, words = WRONG_EXTRAS[kind]
    settings = load_settings(workplace / "recipe.yaml")
    position = {
        "bins_a_step": sequences_per_step(settings),
        "data": "x",
        "model": {},
        "levels": {},
        "mtp_num_layers": 0,
    }
    checkpoint = save_checkpoint(tmp_path, 3, torch.nn.Linear(2, 2), None, position, rng_states(HOST))
    check_place(read_info(checkpoint), settings, HOST)
    break_it(checkpoint)
    with pytest.raises(UserError) as caught:
        check_place(read_info(checkpoint), settings, HOST)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_missing_random_states_of_a_rank_are_one_line(workplace, uninterrupted, tmp_path):
    """Found before the data is read; other numbers of ranks need none."""
    save = tmp_path / "run"
    shutil.copytree(uninterrupted, save)
    (save / "iter_0000012/rank_00001.json").unlink()
    as_before(save / "iter_0000012")
    done = train(workplace, save, 2, *RECIPE, "training.train_iters=13")
    assert done.returncode == 1
    words = "is missing, though another of the 2 ranks has one; move it away to use iter_0000008"
    assert done.stderr == f"error: {save}/iter_0000012/rank_00001.json: {words}\n"
    assert "data:" not in done.stdout


FULL_DISK = """
import sys
def hook(event, args):
    if event == "open" and str(args[0]).endswith({path!r}):
        raise OSError(28, "No space left on device")
sys.addaudithook(hook)
"""


def test_a_save_that_fails_in_the_background_stops_the_run(workplace, tmp_path):
    """On one rank, while others go on: one line by the next save; the last checkpoint stays."""
    save = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK.format(path="iter_0000008.tmp/__1_0.distcp"))
    # no restart either: the disk would be as full
    process = start_training(
        workplace, save, 2, "training.train_iters=16", *SAVES, "training.max_restarts=2", PYTHONPATH=str(tmp_path)
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err == f"error: {save}/iter_0000008 cannot be written: No space left on device\n", err
    assert 8 <= read_metrics(save / "metrics.jsonl")[-1]["step"] <= 12
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000004"]


SMALL_DISK = """
import shutil
real = shutil.disk_usage
shutil.disk_usage = lambda path: real(path)._replace(free={free})
"""


def test_checkpoints_that_will_not_fit_are_refused_before_the_first_step(workplace, uninterrupted, tmp_path):
    """One line names what is needed; with fewer to keep the same disk is enough, to the end."""
    save, checkpoint = tmp_path / "run", newest_checkpoint(uninterrupted)
    size = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
    (tmp_path / "sitecustomize.py").write_text(SMALL_DISK.format(free=int(2.2 * size)))

    def start(workplace, save, processes, *overrides):
        return start_training(workplace, save, processes, *overrides, PYTHONPATH=str(tmp_path))

    refused = train(workplace, save, 2, *RECIPE, how=start)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
    found = re.search(r"this run needs ([\d,]+) bytes for 3 checkpoints of ([\d,]+) bytes", refused.stderr)
    needed, each = (int(number.replace(",", "")) for number in found.groups())
    assert needed == 3 * each and 0.75 * size < each <= size  # the rest are headers of small tensors
    assert "training.save_total_limit" in refused.stderr and not save.exists()
    done = train(workplace, save, 2, *RECIPE, "training.save_total_limit=1", how=start)
    assert done.returncode == 0, done.stderr


def test_what_checkpoints_take_on_the_disk(tmp_path, monkeypatch):
    weights = [torch.empty(10**9, device="meta", requires_grad=trained) for trained in (True, False)]  # 16 GB

    def needed(step: int, **settings) -> int:
        t = TrainingSettings(save=str(tmp_path / "not/there"), **{"train_iters": 100, **settings})
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**18))
        line = check_disk(t, weights, step, t.train_iters)
        assert "of 16,000,000,000 bytes" in line
        count = int(line.split()[0])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=count * 16 * 10**9 - 1))
        if count:
            with pytest.raises(CheckpointError, match=f"needs {count * 16 * 10**9:,} bytes for {count} checkpoint"):
                check_disk(t, weights, step, t.train_iters)
        return count

    assert needed(0) == needed(99) == needed(0, save_interval=200) == 1 and needed(100) == 0
    assert needed(0, save_interval=30) == 4 and needed(60, save_interval=30) == needed(65, save_interval=30) == 2
    assert needed(0, save_interval=10, save_total_limit=2) == 3  # the oldest goes once the newest is complete
    assert needed(90, save_interval=10, save_total_limit=2) == 1
    epochs = TrainingSettings(save=str(tmp_path / "not/there"), train_epochs=2, save_interval=10)  # of unknown length
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**18))
    assert [check_disk(epochs, weights, step, None).split(" of ")[0] for step in (0, 95)] == [
        "at least 1 checkpoint"
    ] * 2
    assert check_disk(epochs, weights, 0, 35).startswith("4 checkpoints of ")
    for step in (30, 40, 50):
        (tmp_path / f"not/there/iter_{step:07}").mkdir(parents=True)
    assert needed(50, save_interval=10, save_total_limit=2) == 1  # these are there already
    assert needed(50, save_interval=10, save_total_limit=4) == 2 and needed(50, save_interval=10) == 5


def test_resuming_on_other_numbers_of_ranks_gives_the_same_curve(workplace, two, tmp_path):
    """Two ranks, one with twice the micro-steps, two again; of three checkpoints two are kept."""
    save = tmp_path / "run"
    shutil.copytree(two, save)
    shutil.rmtree(save / "iter_0000010")
    settings = ("training.save_interval=2", "training.save_total_limit=2")
    for processes, micro_steps, first in ((1, 2, 6), (2, 1, 9)):
        done = train(workplace, save, processes, *settings, f"training.gradient_accumulation_steps={micro_steps}")
        assert done.returncode == 0, done.stderr
        assert f"2 packed sequences of 160 tokens per step, steps {first} to 10" in done.stdout
        assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000008", "iter_0000010"]
        if processes == 1:
            words = r"^checkpoints between steps: 2; .* \d+\.\d\d s"
            assert re.search(words, done.stdout, re.MULTILINE)
            shutil.rmtree(save / "iter_0000010")
    lines, wanted = (read_metrics(folder / "metrics.jsonl") for folder in (save, two))
    assert len(lines) == len(wanted) == 10
    for line, other in zip(lines, wanted, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6), line["step"]
        assert line["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-6), line["step"]
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), line["step"]
        assert all(line[key] == other[key] for key in ("lr", "tokens", "label_tokens", "image_tokens"))
    a, b = tensors(save), tensors(two)
    assert all((a[name] - b[name]).norm() <= 1e-6 * b[name].norm() + 1e-7 for name in b)


def test_resuming_with_another_config_is_refused(workplace, tmp_path):
    """The shapes are the same: changed values are named, unless the checkpoint has none."""
    config, settings = load_config(workplace / "weights"), load_settings(workplace / "recipe.yaml")
    levels = {"image": {"mean": (0.5, 0.5, 0.5), "scale": 1 / 255}}
    position = {"bins_a_step": 2, "data": "x", "model": asdict(config), "levels": levels, "mtp_num_layers": 0}
    text = replace(config.text, rms_norm_eps=1e-5, initializer_range=0.5, layer_types=config.text.layer_types[::-1])
    kept = {**position, "model": asdict(replace(config, text=text, video_token_id=7))}

    def loaded(extra: dict) -> CheckpointInfo:
        return CheckpointInfo(
            tmp_path / "iter_0000003", 3, 1, True, decode(json.loads(json.dumps(encode(extra)))), None
        )

    check_extra(loaded(position), position, settings)
    check_same(tmp_path / "iter_0000003", {}, config)
    with pytest.raises(ConfigError) as caught:
        check_same(tmp_path / "iter_0000003", loaded(kept).extra["model"], config)
    words = str(caught.value)
    assert "iter_0000003 was made with another config.json (text.layer_types: ('full_attention', " in words
    assert "; text.rms_norm_eps: 1e-05 -> 1e-06; video_token_id: 7 -> " in words
    assert "initializer_range" not in words and "\n" not in words
    brighter = {**position, "levels": {"image": {"mean": (0.4, 0.5, 0.5), "scale": 1 / 255}}}
    what = "with other images or videos, or another normalization of pixels"
    with pytest.raises(SettingError, match=rf"{what} \(image\.mean: \(0\.4, 0\.5, 0\.5\) -> \(0\.5, "):
        check_extra(loaded(brighter), position, settings)
    check_extra(loaded(position), {**position, "levels": {"image": levels["image"] | {"files": "a"}}}, settings)
    check_extra(loaded({k: v for k, v in brighter.items() if k != "levels"}), position, settings)
    check_extra(loaded(brighter), {**position, "levels": {}}, settings)  # no images


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(workplace, uninterrupted, tmp_path, number):
    save = tmp_path / "run"
    process = start_and_wait(workplace, save, "os.rename", "iter_0000004.tmp", *RECIPE)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    if number == signal.SIGTERM:  # as schedulers do, to every process of the job
        assert len(children) >= 4  # two ranks, and a worker of the loader each
        for child in children:
            child.send_signal(number)
    assert wait_for(lambda: "stopping: " in process.err, process)  # by then the launcher has told the ranks
    (tmp_path / "moment" / "go_on").touch()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    step = int(newest_checkpoint(save).name[5:])
    assert 6 <= step < STEPS and step % 2 == 0  # where the ranks meet
    assert f"stopped and saved after step {step} of {STEPS}; the same command goes on from there" in out
    assert not psutil.wait_procs(children, timeout=300)[1]
    assert len(read_metrics(save / "metrics.jsonl")) == step
    assert f"steps {step + 1} to {STEPS}" in finish(workplace, save)
    assert_same_run(save, uninterrupted)


def test_a_save_folder_in_use_is_refused(workplace, tmp_path):
    """A second job starts nothing and touches no file; killing the first frees the folder."""
    save = tmp_path / "run"
    first = start_training(workplace, save, 1, "training.train_iters=100000")
    wait_for(lambda: read_metrics(save / "metrics.jsonl"), first)
    [rank] = psutil.Process(first.pid).children()
    rank.suspend()  # it need not train while the second waits for the folder
    try:
        second = train(workplace, save, 1, "training.train_iters=100000")
    finally:
        rank.resume()
    assert second.returncode == 1
    words = f"error: {save} is in use by another job (process {rank.pid} on "
    assert second.stderr.startswith(words) and second.stderr.count("\n") == 1
    assert first.poll() is None
    kill_all(first)
    with holding(save):
        pass


TRY_THE_LOCK = """
import sys
from pathlib import Path
from qwen35.checkpoint import lock
lock.LOCK_TIMEOUT = 0
with lock.holding(Path(sys.argv[1])):
    pass
"""


def test_the_lock_excludes_other_jobs(tmp_path):
    """It comes with the folder, goes with an empty one, and excludes jobs on one machine."""
    folder = tmp_path / "a" / "run"
    with holding(folder) as warning:
        assert warning is None
        assert (folder / ".lock").is_file()
        other = run_code(TRY_THE_LOCK, str(folder))
        assert "in use by another job (process" in other.stderr
    assert not folder.exists()
    with holding(folder):
        (folder / "config.yaml").touch()
    assert (folder / "config.yaml").exists()


def test_a_lock_removed_while_another_job_waits_is_not_shared(tmp_path):
    """The first job removes its empty folder; the waiting job locks a new one, a third none."""
    folder = tmp_path / "run"
    code = """
import sys, time
from pathlib import Path
from qwen35.checkpoint import lock
tries = []
def hook(event, args):
    if event == "fcntl.lockf":
        tries.append(event)
        if len(tries) == 2:
            print("waits", flush=True)
sys.addaudithook(hook)
lock.LOCK_TIMEOUT = float(sys.argv[2])
with lock.holding(Path(sys.argv[1])):
    print(Path(sys.argv[1], lock.LOCK).exists(), flush=True)
    time.sleep(600)
"""
    with holding(folder):
        second = Forked(ran, [code, str(folder), "300"], {})
        assert wait_for(lambda: second.out == "waits\n", second)
    assert wait_for(lambda: second.out == "waits\nTrue\n", second)
    third = run_code(code, str(folder), "0")
    second.kill()
    second.communicate()
    assert f"in use by another job (process {second.pid} on " in third.stderr


def test_a_removed_lock_file_lets_nobody_in(tmp_path):
    """Nor does a new file in its place; a forked worker that lives on keeps nobody out."""
    with holding(tmp_path):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        worker.start()
        for act in ((tmp_path / ".lock").unlink, (tmp_path / ".lock").touch):
            act()
            second = run_code(TRY_THE_LOCK, str(tmp_path))
            assert f"{tmp_path} is in use by another job" in second.stderr
    third = run_code(TRY_THE_LOCK, str(tmp_path))
    worker.kill()
    worker.join()
    assert (third.returncode, third.stderr) == (0, "")


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    import errno

    import qwen35.checkpoint.lock as module

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", no_locks)
    with holding(tmp_path / "run") as warning:
        assert "this file system has no locks; nothing keeps a second job out" in warning


def test_leftovers_of_stopped_jobs_are_removed(tmp_path):
    names = re.compile(r"iter_\d+")
    for name in ("iter_1", "iter_2.tmp", "iter_3.old", "iter_1.old", "iter_4.tmp", "hf.tmp", "mine.old", "iter_5.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    for name in ("iter_2.tmp", "hf.tmp", "iter_3.old", "iter_1.old"):
        (tmp_path / name / INCOMPLETE).touch()
    told = remove_leftovers(tmp_path, names)
    # iter_4.tmp and iter_5.old are not known to be ours, and the others have names of their own
    left = ["hf.tmp", "iter_1", "iter_3", "iter_4.tmp", "iter_5.old", "mine.old"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    assert len(told) == 2 and "iter_2.tmp" in told[0] and "iter_3 is back" in told[1]
    assert [p.name for p in (tmp_path / "iter_3").iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.seed=7", "training.seed: 42 -> 7"),
        ("data.dataset_param.basic_parameters.cutoff_len=128", "cutoff_len: 160 -> 128"),
        ("data.dataset_param.basic_parameters.max_samples=50", "max_samples: None -> 50"),
        ("data.dataset_param.basic_parameters.dataset=OTHER", "the records or the tokenizer have changed"),
    ],
)
def test_resuming_on_other_data_is_refused(workplace, two, tmp_path, override, words):
    if override.endswith("OTHER"):  # the same file name, one word changed
        records = json.loads((workplace / "records.json").read_text())
        original = (workplace / "records.json").read_text()
        records[17]["conversations"][1]["value"] = "Another answer."
        (workplace / "records.json").write_text(json.dumps(records))
        try:
            done = train(workplace, two, 2, "training.train_iters=12", "training.save_interval=5")
        finally:
            (workplace / "records.json").write_text(original)
    else:
        done = train(workplace, two, 2, "training.train_iters=12", "training.save_interval=5", override)
    assert done.returncode == 1
    assert "iter_0000010 was trained on other data, or in another order" in done.stderr
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_random_states_of_every_rank_are_restored(two):
    kept = [json.loads((newest_checkpoint(two) / f"rank_{rank:05}.json").read_text()) for rank in range(2)]
    assert all(state.keys() == {"python", "numpy", "torch", "device"} for state in kept)

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002

    draw()
    states = rng_states(HOST)
    first, after = draw(), draw()
    restore_rng(states, HOST)
    assert [draw(), draw()] == [first, after]
    assert first != after
