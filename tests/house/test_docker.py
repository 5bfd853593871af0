"""docker/Dockerfile and the guide's docker commands, as far as is known without Docker."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from qwen35.tools.doctor.ascend import DRIVER_DEVICES

ROOT = Path(__file__).parents[2]
STEPS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", (ROOT / "docker/Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]
ARGUMENTS = {rest.partition("=")[0] for step, rest in STEPS if step == "ARG"}
MOUNTS = (
    "/usr/local/Ascend/driver /usr/local/dcmi /usr/local/bin/npu-smi /etc/ascend_install.info /etc/hccn.conf".split()
)


def test_the_image_runs_targets_with_variables_that_exist():
    """Targets of make with variables of env.sh, and no image that would be taken unasked."""
    targets = set(re.findall(r"^([a-z-]+): ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    variables = set(re.findall(r'^: "\$\{(\w+):=', (ROOT / "env.sh").read_text(), re.MULTILINE))
    made = [re.findall(r"\bmake ([a-z-]+)((?: \w+=\S+)*)", rest.replace('", "', " ")) for _, rest in STEPS]
    called = [call for calls in made for call in calls]
    assert [target for target, _ in called] == ["install", "doctor"]
    assert {target for target, _ in called} <= targets
    assert {word.partition("=")[0] for _, words in called for word in words.split()} == {"DEVICE"}
    assert ARGUMENTS - variables == {"BASE", "PIP_INDEX_URL", "UID", "GID"}
    assert variables & ARGUMENTS and not [name for name in ARGUMENTS if re.search("TOKEN|SECRET|PASSWORD", name)]
    assert [rest for step, rest in STEPS if step == "FROM"] == ["${BASE}"]
    assert ["ARG", "BASE"] in STEPS
    assert [rest for step, rest in STEPS if step == "USER"][-1] == "${UID}:${GID}"


def test_nothing_of_the_users_goes_into_the_image():
    left_out = set((ROOT / ".dockerignore").read_text().split())
    ignored = (line for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#"))
    for pattern in ignored:
        name = pattern.strip("/")
        assert {name, f"**/{name}"} & left_out, pattern
    assert ".git" in left_out
    assert not left_out & {path.name for path in ROOT.iterdir() if path.name in ("qwen35", "scripts", "env.sh")}


@pytest.mark.parametrize("page", ["guide.md", "guide.zh-CN.md"])
def test_docker_commands_of_the_guide_name_what_exists(page, tmp_path):
    """As a shell hands them to Docker, on a machine with two NPUs."""
    (block,) = re.findall(r"```bash\n(docker build.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    for name in ("davinci0", "davinci1", *DRIVER_DEVICES):
        (tmp_path / name).touch()
    script = re.sub(r"<\S+>", "base", block).replace("/dev/", f"{tmp_path}/")
    docker = 'docker() { printf "%q " "$@"; echo; }\n'
    done = subprocess.run(["bash", "-euc", docker + script], cwd=tmp_path, capture_output=True, text=True, check=True)
    build, run = (shlex.split(line) for line in done.stdout.splitlines())
    assert (ROOT / build[build.index("-f") + 1]).is_file() and build[-1] == "."
    given = [word for word in build if "=" in word]
    assert {word.partition("=")[0] for word in given} == {"BASE", "UID", "GID"} <= ARGUMENTS
    assert f"GID={(tmp_path / 'davinci_manager').stat().st_gid}" in given
    devices = [word for before, word in itertools.pairwise(run) if before == "--device"]
    assert devices == [f"{tmp_path}/{name}" for name in ("davinci0", "davinci1", *DRIVER_DEVICES)]
    mounts = [word.split(":") for before, word in itertools.pairwise(run) if before == "-v"]
    assert [mount for mount in mounts if mount[-1] == "ro"] == [[path, path, "ro"] for path in MOUNTS]
    (workdir,) = [rest for step, rest in STEPS if step == "WORKDIR"]
    own = [mount for mount in mounts if len(mount) == 2]
    assert own == [[f"{tmp_path}/{name}", f"{workdir}/{name}"] for name in ("ckpt", "data", "runs")]
    assert {"--network", "--shm-size", "--rm"} <= set(run) and run[-3:] == ["qwen35", "make", "doctor"]
