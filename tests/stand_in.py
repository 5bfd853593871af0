"""A stand-in for `make doctor` with eight NPUs and no fault; each test breaks something."""

import json
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from packaging.markers import Marker
from ports import free_port

from qwen35.tools.doctor.__main__ import lines
from qwen35.tools.doctor.host import Finding, Machine

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "configs/tiny.yaml")
LOCK = ROOT / "scripts/requirements/npu-arm.txt"

HEAD = """
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.2                   Version: 25.5.2                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
"""
MIDDLE = """
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
"""


def table(npus: int = 8, health: str = "OK", users: dict[int, int] | None = None) -> str:
    """What npu-smi prints; the health is the last one's, users are NPU -> process id."""
    users = users or {}
    rows = "".join(
        f"| {i}     910B3               | {health if i == npus - 1 else 'OK':13} |"
        " 91.3        36                0    / 0             |\n"
        f"| 0                         | 0000:C{i}:00.0  | 0           0    / 0          {3400 + i} / 65536         |\n"
        for i in range(npus)
    )
    processes = "".join(
        f"| {i}       0                 | {users[i]:<13} | python3                  | 30000                   |\n"
        if i in users
        else f"| No running processes found in NPU {i}                                                            |\n"
        for i in range(npus)
    )
    return HEAD.lstrip() + rows + MIDDLE.lstrip() + processes


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def install(site: Path, name: str, version: str, *requires: str) -> None:
    for old in site.glob(f"{name.replace('-', '_')}-*.dist-info"):
        shutil.rmtree(old)
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    write(folder / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")


def answer(m: Machine, version: str = "2.7.1", devices: int = 8) -> None:
    """What the stand-in Python says when torch is imported."""
    program(Path(m.python), f"echo '{json.dumps([version, devices])}'")


def npu_machine(tmp_path: Path) -> Machine:
    """Eight NPUs, all free, CANN 8.5, the driver, and the lock file's packages."""
    site, files, home = tmp_path / "site", tmp_path / "files", tmp_path / "cann"
    for line in LOCK.read_text().splitlines():
        pin, _, marker = line.partition(" ; ")
        is_for_triton = line.startswith(
            ("triton-ascend", "pybind11")
        )  # the stand-in has Python 3.10, wherever this runs
        if not line.startswith("#") and (is_for_triton or not marker or Marker(marker).evaluate()):
            install(site, *pin.split("=="))
    install(site, "torch-npu", "2.7.1.post2", "torch==2.7.1")
    install(site, "qwen35", "0.1.0")
    write(site / "qwen35-0.1.0.dist-info/direct_url.json", json.dumps({"url": tmp_path.as_uri()}))
    write(tmp_path / ".venv/.installed", "npu-arm-2.7.1.post2-3.10.13\n")
    write(tmp_path / "scripts/requirements/npu-arm.txt", LOCK.read_text())
    for name in ("davinci_manager", "devmm_svm", "hisi_hdc", *(f"davinci{i}" for i in range(8))):
        write(files / "dev" / name)
    (files / "dev/shm").mkdir()
    write(files / "usr/local/Ascend/driver/version.info", "Version=25.5.2\nascendhal_version=7.35.23\n")
    info = f"package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100R001C25\npath={home}\n"
    for kind in ("toolkit", "ops"):
        write(home / f"{platform.machine()}-linux/ascend_{kind}_install.info", info)
    for name in ("g++", "bishengir-compile", "bisheng"):
        program(tmp_path / "bin" / name, "exit 1")
    write(tmp_path / "include/Python.h")
    program(tmp_path / "bin/npu-smi", f"cat <<'END'\n{table()}END")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "ASCEND_HOME_PATH": str(home),
        "MASTER_PORT": str(free_port()),
        "HCCL_SOCKET_IFNAME": "eth",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    found = Machine(
        "npu",
        environment,
        tmp_path,
        files,
        (str(site),),
        str(tmp_path / "bin/python"),
        (3, 10, 13),
        str(tmp_path / "include"),
    )
    answer(found)
    return found


def given(m: Machine, **variables: str) -> Machine:
    return replace(m, environment={**m.environment, **variables})


def only(findings: Finding | Iterable[Finding], status: str) -> str:
    """The one line of that status."""
    [line] = lines([f for f in ([findings] if isinstance(findings, Finding) else findings) if f.status == status])
    return line


def wrong(findings: Finding | Iterable[Finding]) -> str:
    line = only(findings, "wrong")
    assert " -> " in line  # what to do
    return line
