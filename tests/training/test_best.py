"""The best validation's checkpoint: which one it is, that it stays, and that a resume goes on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import save_checkpoint
from training_runs import assert_same_run, train

from qwen35.checkpoint.dcp import CheckpointInfo, read_info
from qwen35.checkpoint.dcp_folder import BEST, keep_newest, newest_checkpoint, write_best
from qwen35.checkpoint.errors import CheckpointError
from qwen35.config.load import SettingError, load_settings
from qwen35.config.schema import TrainingSettings
from qwen35.tools.doctor.host import Machine
from qwen35.tools.doctor.recipe import recipe
from qwen35.training.best import Best
from qwen35.training.metrics import read_metrics
from qwen35.training.resume import save_steps

DATASET = "data.val_dataset_param.basic_parameters.dataset"
CONSTANT = ("training.lr_decay_style=constant", "training.lr_warmup_ratio=0")


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("figure", "values", "best"),
    [
        ("loss", [3.0, 2.0, 2.5, 2.0, math.nan, 1.5, 1.6], [1, 2, 2, 2, 2, 6, 6]),
        ("exact_match", [0.0, 0.5, 0.25, 0.5, 0.75], [1, 2, 2, 2, 5]),
        ("loss", [math.nan, 4.0], [0, 2]),
    ],
)
def test_the_best_is_better_than_all_before(figure, values, best):
    seen, found = Best(figure), []
    for step, value in enumerate(values, 1):
        seen.add(step, {f"val_{figure}": value, "val_other": -value})
        found.append(seen.step)
        assert seen.since == step - best[step - 1]
    assert found == best
    assert Best(figure).extra() == {} and Best(figure).message("x") == ""
    told = f"runs/x/iter_{best[-1]:07} has the best validation, {figure} {values[best[-1] - 1]:.6g}: "
    assert seen.message("runs/x").startswith(told)


def test_the_best_checkpoint_is_never_removed(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, step, torch.nn.Linear(2, 2), None, {}, {})
    write_best(tmp_path, 2)
    keep_newest(tmp_path, 2)
    assert sorted(path.name[-1] for path in tmp_path.glob("iter_*")) == ["2", "4", "5"]
    write_best(tmp_path, 4)
    keep_newest(tmp_path, 1)
    assert sorted(path.name[-1] for path in tmp_path.glob("iter_*")) == ["4", "5"]


def test_a_start_names_what_a_stopped_job_could_not(tmp_path, alone):
    """Also when the best checkpoint is gone, or another figure is compared from now on."""
    t = TrainingSettings(save=str(tmp_path), train_iters=9, save_best="loss", val_interval=1)
    assert Best.of(t, None) == Best("loss") and not (tmp_path / BEST).exists()
    best = Best("loss", 1.5, 3, 1)
    for step in (3, 4):
        save_checkpoint(tmp_path, step, torch.nn.Linear(2, 2), None, best.extra(), {})
    info = read_info(tmp_path / "iter_0000004")
    for stale in (None, 2, 7):
        write_best(tmp_path, stale)
        assert Best.of(t, info) == best and (tmp_path / BEST).read_text() == "3"
    by_answers = TrainingSettings(**{**vars(t), "save_best": "exact_match"})
    assert Best.of(by_answers, info) == Best("exact_match") and not (tmp_path / BEST).exists()
    elsewhere = TrainingSettings(**{**vars(t), "save": str(tmp_path / "other")})
    (tmp_path / "other").mkdir()
    assert Best.of(elsewhere, info) == Best("loss")
    shutil.rmtree(tmp_path / "iter_0000003")
    write_best(tmp_path, 3)
    assert Best.of(t, info) == Best("loss") and not (tmp_path / BEST).exists()


def test_figures_of_other_validation_data_are_not_compared(tmp_path, alone, caplog):
    """Of the same file, too, with other records: its name in the settings does not show that."""
    t = TrainingSettings(save=str(tmp_path), train_iters=9, save_best="loss", val_interval=1)
    best = Best("loss", 1.5, 3, 1, "of before")
    save_checkpoint(tmp_path, 3, torch.nn.Linear(2, 2), None, best.extra(), {})
    info = read_info(tmp_path / "iter_0000003")
    assert Best.of(t, info, "of before") == best and "validation data" not in caplog.text
    assert Best.of(t, info, "of now") == Best("loss", data="of now") and not (tmp_path / BEST).exists()
    assert "the validation data have changed since the checkpoint: the best is found anew" in caplog.text
    state = {name: value for name, value in best.extra()["best_validation"].items() if name != "data"}
    before = CheckpointInfo(info.path, 3, 1, True, {"best_validation": state}, None)  # did not say
    assert Best.of(t, before, "of now") == Best("loss", 1.5, 3, 1, "of now")


@pytest.mark.parametrize("state", [3, {}, {"figure": "loss", "value": "low", "step": 3}, {"figure": "loss", "step": 3}])
def test_a_damaged_state_is_one_line(tmp_path, alone, state):
    t = TrainingSettings(save=str(tmp_path), train_iters=9)
    info = CheckpointInfo(tmp_path / "iter_0000004", 4, 1, True, {"best_validation": state}, None)
    with pytest.raises(CheckpointError, match=r"extra\.json: does not hold best_validation as a run writes it"):
        Best.of(t, info)


def test_steps_at_which_a_run_may_save():
    """Against a loop over all steps."""
    for every, best, val in ((None, None, 3), (4, None, 3), (4, "loss", 3), (None, "loss", 5), (6, "loss", 6)):
        t = TrainingSettings(save="x", train_iters=20, save_interval=every, save_best=best, val_interval=val)
        for done in range(22):
            slow = {s for s in range(done + 1, 21) if s == 20 or (every and s % every == 0) or (best and s % val == 0)}
            assert save_steps(t, done, 20) == slow


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.save_best=loss"], "training.save_best means nothing without training.val_interval"),
        (["training.early_stopping_patience=1"], "early_stopping_patience means nothing without training.val_interval"),
        (
            [f"{DATASET}=a", "training.val_interval=1", "training.save_best=exact_match"],
            "set training.val_generate: true",
        ),
        (["training.save_best=accuracy"], "training.save_best: 'accuracy' is not one of 'loss' or 'exact_match'"),
    ],
)
def test_what_cannot_be_compared_is_refused(workplace, overrides, words):
    with pytest.raises(SettingError, match=words):
        load_settings(workplace / "recipe.yaml", overrides)


@pytest.fixture(scope="module")
def validating(workplace) -> tuple[str, ...]:
    """A validation each step of nine, of answers such as no trained record has.

    Their loss falls while the form of an answer is learnt, and rises from the fourth step on.
    """
    records = json.loads((workplace / "records.json").read_text())[:7]
    for record in records:
        record["conversations"][1]["value"] = "QXZJKV WRT"
    (workplace / "few.json").write_text(json.dumps(records))
    common = ("training.train_iters=9", "training.val_interval=1", "training.lr=0.03", "training.log_interval=1")
    return *CONSTANT, *common, f"{DATASET}={workplace / 'few.json'}"


KEPT = ("training.save_best=loss", "training.save_total_limit=1", "training.save_interval=5")


@pytest.fixture(scope="module")
def best(workplace, validating) -> tuple[Path, str]:
    save = workplace / "best"
    done = train(workplace, save, 2, *validating, *KEPT)
    assert done.returncode == 0, done.stderr
    return save, done.stdout


def losses(save: Path) -> dict[int, float]:
    return {line["step"]: line["val_loss"] for line in read_metrics(save / "metrics.jsonl")}


def test_the_best_checkpoint_stays_beside_the_newest(best):
    save, console = best
    found = losses(save)
    lowest = min(found, key=found.__getitem__)
    assert len(found) == 9 and lowest < 9 and lowest % 5, found  # neither the last step nor a multiple of save_interval
    assert sorted(path.name for path in save.glob("iter_*")) == [f"iter_{lowest:07}", "iter_0000009"]
    assert (save / BEST).read_text() == str(lowest)
    assert newest_checkpoint(save) == save / "iter_0000009"
    for name in (f"iter_{lowest:07}", "iter_0000009"):
        state = read_info(save / name).extra["best_validation"]
        assert (state["figure"], state["value"], state["step"]) == ("loss", found[lowest], lowest)
    assert f"{save}/iter_{lowest:07} has the best validation, loss {found[lowest]:.6g}: name it" in console


def test_a_resumed_run_knows_the_best_so_far(workplace, validating, best, tmp_path):
    """Ended after steps four and seven: the same checkpoints and the same run, bit for bit."""
    save, _ = best
    for steps in (4, 7, 9):
        done = train(workplace, tmp_path / "run", 2, *validating, *KEPT, f"training.train_iters={steps}")
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", save)
    assert losses(tmp_path / "run") == losses(save)
    assert (tmp_path / "run" / BEST).read_text() == (save / BEST).read_text()
    names = [sorted(path.name for path in folder.glob("iter_*")) for folder in (tmp_path / "run", save)]
    assert names[0] == names[1]


def test_a_run_ends_early_and_stays_ended(workplace, validating, best, tmp_path):
    """As at its normal end: saved, code 0, the same steps; a resume in between counts on."""
    save, found = tmp_path / "run", losses(best[0])
    # the first step whose loss is below all before, and not above that of any of the next three
    lowest = next(step for step in found if found[step] == min(loss for n, loss in found.items() if n <= step + 3))
    end = lowest + 3
    patient = (*validating, "training.early_stopping_patience=3")
    first = train(workplace, save, 2, *patient, f"training.train_iters={lowest + 1}")
    assert first.returncode == 0, first.stderr
    assert read_info(newest_checkpoint(save)).extra["best_validation"]["since"] == 1
    done = train(workplace, save, 2, *patient)
    assert done.returncode == 0, done.stderr
    why = f"early stopping: 3 validations in a row not better than loss {found[lowest]:.6g} of step {lowest}"
    assert f"{why}: the run ends after step {end} of 9" in done.stdout
    assert f"trained steps {lowest + 2} to {end} in " in done.stdout and "stopped and saved" not in done.stdout
    assert newest_checkpoint(save).name == f"iter_{end:07}"
    assert losses(save) == {step: loss for step, loss in found.items() if step <= end}
    assert not (save / BEST).exists()  # save_best is not set
    again = train(workplace, save, 2, *patient)
    assert again.returncode == 0, again.stderr
    assert why in again.stdout and f"has done all its {end} steps: nothing left to train" in again.stdout
    looked = recipe(Machine(None, {}), str(workplace / "recipe.yaml"), [f"training.save={save}", *patient])
    assert {f.status for f in looked} <= {"ok", "note"}
    assert f"{why}: the run is over after step {end} of 9" in [f.fact for f in looked if f.status == "note"]
    more = train(workplace, save, 2, *patient, "training.early_stopping_patience=9")
    assert more.returncode == 0, more.stderr
    assert_same_run(save, best[0])
