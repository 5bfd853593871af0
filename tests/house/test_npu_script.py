"""scripts/test-npu.sh says in one line why nothing was tested; tests/npu has what it runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path) -> Path:
    """The scripts, and the installation, without what an earlier run has downloaded."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "env.sh", tmp_path)
    (tmp_path / ".venv").symlink_to((ROOT / ".venv").resolve())
    return tmp_path


def run(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""} | variables
    command = ["bash", str(folder / "scripts" / script)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_without_the_wheel_nothing_is_tested_and_one_line_says_so(copy):
    done = run(copy, "test-npu.sh")
    assert done.returncode == 3 and not done.stdout
    [line] = done.stderr.splitlines()
    assert all(word in line for word in ("test-npu.sh", "nothing tested", "torch-npu 2.7.1.post2", "cp310"))


def test_without_the_wheel_nothing_is_rehearsed(copy):
    for script in ("plan.sh", "rehearse.sh"):
        done = run(copy, script, NODES="2")
        assert done.returncode == 3 and not done.stdout
        [line] = done.stderr.splitlines()
        assert all(word in line for word in (script, "nothing rehearsed", "torch-npu "))
    for name, value in (("NODES", "none"), ("NPU_MEMORY_GB", "0")):
        done = run(copy, "rehearse.sh", **{name: value})
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"rehearse.sh: {name}={value}" in done.stderr and " 1\n" in done.stderr


def test_an_environment_that_is_not_there_is_named(copy):
    for torch, words in (("2.9.0", "TORCH=2.9.0"), ("2.7.1", "make test-versions")):
        wheel = copy / "build/npu/wheels/torch_npu-2.7.1.post2-cp310-cp310-any.whl"
        wheel.parent.mkdir(parents=True, exist_ok=True)
        wheel.touch()
        done = run(copy, "test-npu.sh", TORCH=torch)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_other_tests_run_without_the_wheel(copy):
    (copy / "tests").mkdir()
    (copy / "tests/test_one.py").write_text("def test_one(): pass\n")
    shutil.copy(ROOT / "pyproject.toml", copy)
    done = run(copy, "test.sh")
    assert done.returncode == 0 and "1 passed" in done.stdout and "nothing tested" in done.stderr, done.stderr
    chosen = run(copy, "test.sh", ARGS="-k one")
    assert chosen.returncode == 0 and "nothing tested" not in chosen.stderr
