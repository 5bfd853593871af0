"""`make doctor` of a run that resumes: it finds what the run itself refuses, in the same words."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_cases import as_before
from safetensors.torch import load_file, save_file
from training_runs import ROOT, train

from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.config.load import load_settings
from qwen35.tools.doctor.host import Finding, Machine
from qwen35.tools.doctor.recipe import recipe

BASIC = "data.dataset_param.basic_parameters"
HOLD = """
import sys
from pathlib import Path
from qwen35.checkpoint.lock import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def found(workplace: Path, *overrides: str) -> list[Finding]:
    """On a machine whose two processes would resume the run."""
    return recipe(Machine(None, {}), str(workplace / "recipe.yaml"), list(overrides))


def copied(run: Path, folder: Path) -> Path:
    """A run that was saved in `folder`/run."""
    save = Path(shutil.copytree(run, folder / "run"))
    recipe_of_run = save / "config.yaml"
    recipe_of_run.write_text(recipe_of_run.read_text().replace(f"save: {run}\n", f"save: {save}\n"))
    return save


def other_records(workplace: Path, folder: Path) -> list[str]:
    records = json.loads((workplace / "records.json").read_text())
    records[0]["conversations"][1]["value"] = "Nobody knows."
    (folder / "records.json").write_text(json.dumps(records))
    return [f"{BASIC}.dataset={folder / 'records.json'}", "training.train_iters=20"]


def damaged_balance(_: Path, folder: Path) -> list[str]:
    checkpoint = newest_checkpoint(folder / "run")
    assert checkpoint
    extra = checkpoint / "extra.json"
    extra.write_text(json.dumps(json.loads(extra.read_text()) | {"expert_balance": 1}))
    as_before(checkpoint)  # which has no checksums
    balance = ["training.expert_balance=1.5", "parallel.expert_parallel_size=2", "training.save_interval=5"]
    return [*balance, "training.train_iters=20"]


CASES: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "records": (other_records, "was trained on other data, or in another order"),
    "seed": (lambda *_: ["training.seed=7", "training.train_iters=20"], "training.seed: "),
    "length": (lambda *_: [f"{BASIC}.cutoff_len=200", "training.train_iters=20"], "cutoff_len: 160 -> 200"),
    "steps": (lambda *_: ["training.micro_batch_size=2"], "packed sequences per step"),
    "adapters": (lambda *_: ["training.lora.r=8"], "holds a run without adapters; name another folder"),
    "expert balance": (damaged_balance, "extra.json: does not hold expert_balance as a run writes it"),
    "finished": (lambda *_: ["training.lr=0.5"], "holds 10 steps of other settings (training.lr: "),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_resume_refuses_is_wrong(workplace: Path, two: Path, tmp_path: Path, case: str) -> None:
    change, expected = CASES[case]
    save = copied(two, tmp_path)
    overrides = [f"training.save={save}", *change(workplace, tmp_path)]
    done = train(workplace, save, 2, *overrides[1:])
    assert done.returncode == 1 and expected in done.stderr, done.stderr
    [line] = [f.fact for f in found(workplace, *overrides) if f.status == "wrong"]
    assert done.stderr.splitlines()[-1] == f"error: {line}"


def test_what_a_resume_takes_is_not_wrong(workplace: Path, two: Path, tmp_path: Path) -> None:
    """More steps, another rate: a run that goes on. The same settings: a run that has finished."""
    save = copied(two, tmp_path)
    before = sorted(path.name for path in save.rglob("*"))
    for more in ([], ["training.train_iters=20", "training.lr=0.5", "training.async_save=false"]):
        findings = found(workplace, f"training.save={save}", *more)
        assert {f.status for f in findings} <= {"ok", "note"}, findings
        [line] = [f.fact for f in findings if f.subject == "weights"]
        assert line == f"from {newest_checkpoint(save)}"
    assert sorted(path.name for path in save.rglob("*")) == before


def test_a_newer_checkpoint_beside_the_named_one_is_nothing_to_note(workplace: Path, two: Path, tmp_path: Path) -> None:
    older = two / "iter_0000005"
    weights = [f"training.load={older}", "training.init_from_hf_path=null"]
    findings = found(workplace, f"training.save={tmp_path / 'run'}", *weights)
    assert [f.fact for f in findings if f.subject == "weights"] == [f"from {older}"]


def other_weights(workplace: Path, folder: Path) -> list[str]:
    other = shutil.copytree(workplace / "weights", folder / "weights")
    [file] = other.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.language_model.norm.weight"] += 1
    save_file(tensors, file)
    return [f"training.init_from_hf_path={other}", "training.lora.r=8"]


LORA_CASES: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "alpha": (lambda *_: ["training.lora.r=8", "training.lora.lora_alpha=8"], "(alpha: 32.0 -> 8.0); set it as it was"),
    "base": (other_weights, "are others; name the base that they were trained on"),
    "all weights": (lambda *_: [], "holds the adapters of a LoRA run, not a model"),
}


@pytest.fixture(scope="module")
def adapters(workplace: Path) -> Path:
    save = workplace / "doctor_lora"
    done = train(workplace, save, 2, "training.lora.r=8", "training.train_iters=2")
    assert done.returncode == 0, done.stderr
    return save


@pytest.mark.parametrize("case", LORA_CASES)
def test_what_a_lora_run_refuses_is_wrong(workplace: Path, adapters: Path, tmp_path: Path, case: str) -> None:
    change, expected = LORA_CASES[case]
    save = copied(adapters, tmp_path)
    overrides = [f"training.save={save}", "training.train_iters=4", *change(workplace, tmp_path)]
    done = train(workplace, save, 2, *overrides[1:])
    assert done.returncode == 1 and expected in done.stderr, done.stderr
    [line] = [f.fact for f in found(workplace, *overrides) if f.status == "wrong"]
    assert done.stderr.splitlines()[-1] == f"error: {line}"


def test_what_a_lora_run_goes_on_from_is_not_wrong(workplace: Path, adapters: Path) -> None:
    findings = found(workplace, f"training.save={adapters}", "training.lora.r=8")
    assert {f.status for f in findings} <= {"ok", "note"}, findings
    [line] = [f.fact for f in findings if f.subject == "weights"]
    assert line == f"from {workplace}/weights; adapters from {newest_checkpoint(adapters)}"


def test_a_save_folder_without_a_whole_checkpoint_is_wrong(workplace: Path, two: Path, tmp_path: Path) -> None:
    """The run does not quietly start anew."""
    save = copied(two, tmp_path)
    for folder in save.glob("iter_*"):
        (folder / ".metadata").unlink()
    done = train(workplace, save, 2)
    [line] = [f.fact for f in found(workplace, f"training.save={save}") if f.status == "wrong"]
    assert "no complete checkpoint in it" in line and done.stderr.splitlines()[-1] == f"error: {line}"


def test_a_save_folder_of_a_job_that_runs_is_wrong(workplace: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("qwen35.checkpoint.lock.LOCK_TIMEOUT", 0.1)
    save = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(save)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout and job.stdout.readline() == "held\n"
        [line] = [f.fact for f in found(workplace, f"training.save={save}") if f.status == "wrong"]
        assert f"{save} is in use by another job (process {job.pid} on " in line
        job.communicate("")
    assert {f.status for f in found(workplace, f"training.save={save}")} <= {"ok", "note"}


def test_a_save_folder_that_is_a_file_is_wrong(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    [line] = [f.fact for f in found(workplace, f"training.save={tmp_path / 'run/here'}") if f.status == "wrong"]
    assert line == f"training.save: {tmp_path / 'run/here'}: {tmp_path / 'run'} is not a folder; name another folder"


def test_variables_that_contradict_determinism_are_wrong(workplace: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HCCL_DETERMINISTIC", "false")
    overrides = [f"training.save={tmp_path}", "training.deterministic=true"]
    [line] = [f.fact for f in found(workplace, *overrides) if f.status == "wrong"]
    assert "HCCL_DETERMINISTIC=false contradicts training.deterministic: true" in line
    assert load_settings(workplace / "recipe.yaml", overrides).training.deterministic
