"""`make doctor`: Python, packages, CANN, driver and NPUs, and the finding for each fault."""

import platform
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from stand_in import LOCK, answer, given, install, npu_machine, only, program, table, write, wrong

import kernels
from qwen35.tools import stack
from qwen35.tools.doctor import ascend, host
from qwen35.tools.doctor.__main__ import lines, still_needed
from qwen35.tools.doctor.host import Machine
from qwen35.tools.stack import release
from qwen35.tools.triton import triton


@pytest.fixture
def m(tmp_path: Path) -> Machine:
    return npu_machine(tmp_path)


def test_cpu_installation_with_everything_for_npus_needs_nothing_more(m: Machine) -> None:
    assert still_needed(replace(m, accelerator=None)) == []
    (m.files / "usr/local/Ascend/driver/version.info").unlink()
    assert [f.status for f in still_needed(m)] == ["note"]


# -- software -------------------------------------------------------------------------------------


def test_python_out_of_range_is_wrong(m: Machine) -> None:
    assert "3.13.0" in wrong(host.installation(replace(m, python_version=(3, 13, 0))))


def test_installation_differs_from_the_lock_file(m: Machine) -> None:
    site = Path(m.site[0])
    install(site, "numpy", "1.24.0")
    assert "have run on: numpy 1.24.0 -> make install" in only(host.installation(m), "note")
    shutil.rmtree(next(site.glob("tqdm-*")))
    assert "tqdm of npu-arm.txt missing -> make install" in wrong(host.installation(m))
    write(m.root / ".venv/.installed", "npu-arm-3.10.13")  # of an older install.sh
    assert ".installed names no lock file -> make install" in wrong(host.installation(m))
    write(m.root / ".venv/.installed", "gpu")
    assert ".installed names no lock file -> make install" in wrong(host.installation(m))
    (m.root / ".venv/.installed").unlink()
    assert "incomplete -> make install" in wrong(host.installation(m))
    shutil.rmtree(m.root / ".venv")
    assert "there is none yet -> make install" in wrong(host.installation(m))


@pytest.mark.parametrize(
    ("name", "version", "is_in_range"),
    [
        ("torch", "2.6.0", False), ("torch", "2.7.0", False), ("torch", "2.7.1+cpu", True), ("torch", "2.10.0", True),
        ("torch", "2.13.1", True), ("torch", "2.14.0", False), ("torch", "3.0.0", False),
        ("transformers", "4.57.1", False), ("transformers", "5.2.0", True), ("transformers", "5.23.2", True),
        ("transformers", "5.24.0", False),
    ],
)  # fmt: skip
def test_releases_that_nothing_was_tested_on_are_wrong(m: Machine, name: str, version: str, is_in_range: bool) -> None:
    install(Path(m.site[0]), name, version)
    found = [*host.installation(m)]
    if is_in_range:
        assert {f.status for f in found} <= {"ok", "note"}
    else:
        oldest, newest = stack.TESTED[name]
        line = wrong(found)
        assert f"{name}" in line and f"{version}: the code is for {oldest} to {newest} -> make install" in line


def test_all_that_is_installed_is_in_the_range() -> None:
    """Also with another CANN, by versions.txt, and in `make test-versions`."""
    pins = [line.partition(" ; ")[0] for file in LOCK.parent.glob("*.txt") for line in file.read_text().splitlines()]
    found = [pin.split("==") for pin in pins if pin.startswith(("torch==", "transformers=="))]
    found += [["torch", row.torch_npu] for row in stack.stacks()]
    found += re.findall(r': "\$\{(TRANSFORMERS):=([0-9.]+)', (LOCK.parents[2] / "env.sh").read_text())
    assert len(found) > 15 and all(stack.is_tested(name.lower(), version) for name, version in found)


def test_mm_convert_of_another_folder_is_noted(m: Machine) -> None:
    site = Path(m.site[0])
    write(site / "qwen35-0.1.0.dist-info/direct_url.json", '{"url": "file:///other/folder"}')
    assert "file:///other/folder -> make install" in only(host.installation(m), "note")
    shutil.rmtree(site / "qwen35-0.1.0.dist-info")
    assert "qwen35 of npu-arm.txt missing -> make install" in wrong(host.installation(m))


def test_failed_import_of_torch_is_wrong(m: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        Path(m.python), "echo Traceback >&2; echo 'ImportError: libhccl.so: cannot open shared object file' >&2; exit 1"
    )
    assert "ImportError: libhccl.so" in wrong(host.imports(m))
    program(Path(m.python), "kill -SEGV $$")
    assert "status -11" in wrong(host.imports(m))
    program(Path(m.python), "exec sleep 20")
    monkeypatch.setitem(host.SECONDS, "import", 0.3)
    assert "no answer in 0.3 s" in wrong(host.imports(m))


def test_torch_sees_fewer_npus_than_are_visible(m: Machine) -> None:
    answer(m, devices=0)
    assert "sees 0 of 8 NPUs" in wrong(host.imports(m))
    answer(m, devices=2)
    assert only(host.imports(given(m, ASCEND_RT_VISIBLE_DEVICES="4,5")), "ok").endswith("sees 2 NPUs")


def test_triton_beside_triton_ascend_is_wrong(m: Machine) -> None:
    install(Path(m.site[0]), "triton", "3.3.1")
    assert "pip uninstall triton triton-ascend" in wrong(ascend.packages(m))


# -- CANN, driver, NPUs ---------------------------------------------------------------------------


def test_version_of_cann_and_its_operators(m: Machine) -> None:
    home = Path(m.get("ASCEND_HOME_PATH"))
    toolkit, operators = (
        home / f"{platform.machine()}-linux/ascend_{kind}_install.info" for kind in ("toolkit", "ops")
    )
    for version in ("8.3.RC1", "9.3.0", "10.0.0"):
        toolkit.write_text(f"version={version}\n")
        line = wrong(ascend.cann(m))
        assert version in line and "install one of CANN 8.5, 9.0, 9.1, 9.2" in line
    for version in ("8.5.0.alpha003", "9.2.0-beta.2"):
        toolkit.write_text(f"version={version}\n")
        assert "install the package of operators of the same version" in wrong(ascend.cann(m))
        operators.write_text(f"version={version}\n")
        assert version in only(ascend.cann(m), "ok")
    operators.unlink()
    assert "ascend_ops_install.info" in only(ascend.cann(m), "note")
    toolkit.unlink()
    assert "does not say its version" in wrong(ascend.cann(m))
    write(home / "compiler/version.info", "Version=8.1.RC1\n")
    assert "8.1.RC1" in wrong(ascend.cann(m))
    write(home / "compiler/version.info", "Version=7.6.0.1.220\nversion_dir=8.5.0\n")  # the component's, and CANN's
    assert "8.5.0 in" in lines([*ascend.cann(m)])[0]
    assert "/opt/none" in wrong(ascend.cann(given(m, ASCEND_HOME_PATH="", CANN_PATH="/opt/none")))


def of_cann(m: Machine, version: str) -> Machine:
    write(
        Path(m.get("ASCEND_HOME_PATH")) / f"{platform.machine()}-linux/ascend_toolkit_install.info",
        f"version={version}\n",
    )
    return m


# from COMPATIBILITY.md and release notes of Ascend/pytorch, installation guide of triton-ascend
@pytest.mark.parametrize(
    ("cann", "torch_npu", "triton_ascend", "is_on_index"),
    [
        ("8.5", "2.7.1.post2", "3.2.0", True),
        ("9.0", "2.7.1.post4", "3.2.1", False),
        ("9.1", "2.7.1.post8", "3.2.2", False),
        ("9.2", "2.7.1.post11", "3.2.2", False),
    ],
)
def test_stack_of_each_cann(cann: str, torch_npu: str, triton_ascend: str, is_on_index: bool) -> None:
    expected = stack.Stack(cann, torch_npu, triton_ascend, is_on_index)
    assert stack.choose(f"{cann}.0", "") == stack.choose(cann, torch_npu) == expected
    assert stack.of_torch_npu(f"{torch_npu}+git123") == expected
    names = [row.torch_npu for row in stack.stacks()]
    assert len(set(names)) == len(names)  # each torch_npu belongs to one CANN


def test_torch_npu_and_triton_ascend_fit_this_cann(m: Machine) -> None:
    site = Path(m.site[0])
    assert [f.status for f in ascend.packages(m)] == ["ok", "ok"]
    install(site, "torch-npu", "2.7.1.post11")
    line = only(ascend.packages(m), "note")
    assert "2.7.1.post11 is for CANN 9.2, this is 8.5.0" in line and " 2.7.1.post2" in line
    for version in ("2.7.1", "2.9.0.post2", "2.7.1.post99"):  # below, beside and above what is known
        install(site, "torch-npu", version)
        assert f"torch-npu  {version} " in wrong(ascend.packages(m)) and "post2" in wrong(ascend.packages(m))
    install(site, "torch-npu", "2.10.0.post6")
    line = wrong(ascend.packages(of_cann(m, "9.1.0")))
    assert "triton-ascend  3.2.0 does not fit CANN 9.1.0 -> install 3.2.2, or uninstall it and choose" in line
    install(site, "triton-ascend", "3.2.2")
    assert [f.status for f in ascend.packages(m)] == ["ok", "ok"]
    shutil.rmtree(next(site.glob("triton_ascend-*")))
    line = only(ascend.packages(m), "note")
    assert "3.2.2, the version for CANN 9.1, is not on pip's index" in line
    choices = dict(re.findall(r"model\.kernels\.(\w+)=(\w+)", line))
    names = {kernels.OP_ALIASES.get(op, op) for op in choices}
    assert names == set(kernels.TRITON_OPS)
    there = kernels.implementations("npu")
    assert all(name in there[kernels.OP_ALIASES.get(op, op)] for op, name in choices.items())


def test_programs_and_headers_that_triton_ascend_needs(m: Machine) -> None:
    assert {f.status for f in triton(m)} == {"ok"}
    for name in ("g++", "bishengir-compile"):
        (m.root / "bin" / name).unlink()
    (m.root / "include/Python.h").unlink()
    write(m.root / "triton")  # a file
    shutil.rmtree(next(Path(m.site[0]).glob("pybind11-*")))
    alone = given(m, PATH=str(m.root / "bin"))
    text = "\n".join(lines([f for f in triton(alone) if f.status == "wrong"]))
    for expected in (
        "neither clang++ nor g++ is on PATH", f"Python.h           is not in {m.root / 'include'} -> install python3.10-dev",
        "pybind11           is not installed", "bishengir-compile  is not on PATH",
        f"Triton's cache     {m.root / 'triton'}: it is not a folder -> set TRITON_CACHE_DIR",
    ):  # fmt: skip
        assert expected in text
    assert "CC=cc1plus is not a program" in lines([*triton(given(alone, CC="cc1plus"))])[0]
    program(m.root / "bin/bishengir-compile", "exit 1")
    (m.root / "bin/bisheng").unlink()
    assert [f.subject for f in triton(alone) if f.fact == "is not on PATH"] == ["bisheng"]
    program(m.root / "bin/clang++", "exit 1")
    assert lines([*triton(alone)])[0].endswith("bin/clang++")
    shutil.rmtree(next(Path(m.site[0]).glob("triton_ascend-*")))
    assert [*triton(alone)] == []  # nothing is compiled


def test_packages_that_cann_imports(m: Machine) -> None:
    install(Path(m.site[0]), "numpy", "2.4.6")
    assert "numpy 2.4.6: CANN needs numpy<2" in wrong(ascend.packages(m))
    shutil.rmtree(next(Path(m.site[0]).glob("decorator-*")))
    assert "decorator of npu-arm.txt missing -> make install" in wrong(host.installation(m))
    shutil.rmtree(next(Path(m.site[0]).glob("torch_npu-*")))
    assert "torch-npu  is not installed -> make install DEVICE=npu" in wrong(ascend.packages(m))


def test_driver_and_its_device_files(m: Machine) -> None:
    (m.files / "dev/hisi_hdc").unlink()
    assert "--device /dev/hisi_hdc" in wrong(ascend.driver(m))
    write(m.files / "dev/hisi_hdc")
    info = m.files / "usr/local/Ascend/driver/version.info"
    write(m.files / "opt/npu/driver/version.info", info.read_text().replace("25.5.2", "25.0.1"))
    info.unlink()
    assert "version.info" in wrong(ascend.driver(m))
    write(m.files / "etc/ascend_install.info", "UserName=HwHiAiUser\nDriver_Install_Path_Param=/opt/npu\n")
    assert "25.0.1" in only(ascend.driver(m), "ok")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,8"}, "numbers from 0 to 7"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "1,1"}, "each once"),
        ({"NPUS_PER_NODE": "9"}, "NPUS_PER_NODE=9, but 8 are visible -> at most 8"),
        ({"NPUS_PER_NODE": "2", "ASCEND_RT_VISIBLE_DEVICES": "3"}, "NPUS_PER_NODE=2, but 1 is visible -> at most 1"),
    ],
)
def test_npus_that_do_not_exist_are_wrong(m: Machine, variables: dict[str, str], expected: str) -> None:
    assert expected in wrong(ascend.npus(given(m, **variables)))


def test_no_npu_is_wrong(m: Machine) -> None:
    for node in (m.files / "dev").glob("davinci[0-9]"):
        node.unlink()
    assert "no /dev/davinci0" in wrong(ascend.npus(m))


def test_npus_in_use_are_noted_and_unhealthy_ones_are_wrong(m: Machine) -> None:
    smi = m.root / "bin/npu-smi"
    program(smi, f"cat <<'END'\n{table(users={2: 4321})}END")
    findings = [*ascend.npus(m)]
    assert "8 of 8 visible, 7 free" in only(findings, "ok")
    line = only(findings, "note")
    assert "NPU 2  in use by python3 (pid 4321, 30000 MB) -> ASCEND_RT_VISIBLE_DEVICES=0,1,3,4,5,6,7" in line
    assert {f.status for f in ascend.npus(given(m, ASCEND_RT_VISIBLE_DEVICES="0,1"))} == {"ok"}
    assert "-> wait" in only(ascend.npus(given(m, ASCEND_RT_VISIBLE_DEVICES="2")), "note")
    program(smi, f"cat <<'END'\n{table(health='Alarm')}END")
    assert "NPU 7  npu-smi says Alarm" in wrong(ascend.npus(m))


def test_npu_smi_that_fails_hangs_or_is_missing(m: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = m.root / "bin/npu-smi"
    program(smi, "echo 'dcmi module initialize failed. ret is -8005'; exit 1")
    assert "ret is -8005" in wrong(ascend.npus(m))
    program(smi, "exec sleep 20")
    monkeypatch.setitem(host.SECONDS, "npu-smi", 0.3)
    assert "no answer" in wrong(ascend.npus(m))
    assert "not on PATH" in only(ascend.npus(given(m, PATH="/nowhere")), "note")


def test_npu_smi_table_with_two_chips_per_npu() -> None:
    """As on an A3: programs number the chips by their order in the table."""
    text = """
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
| 0     Ascend910           | OK            | 176.9       46                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3100 / 65536         |
| 0     Ascend910           | OK            | -           45                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          2891 / 65536         |
| 1     Ascend910           | OK            | 168.7       36                0    / 0             |
| 0     2                   | 0000:81:00.0  | 0           0    / 0          3120 / 65536         |
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 0       1                 | 3328327       |                          | 50119                   |
| 0       1                 | 3333165       | python                   | 132                     |
| No running processes found in NPU 1                                                            |
"""
    chips = ascend.read_table(text)
    assert [len(users) for _, _, users in chips] == [0, 2, 0]
    assert chips[1][2][0] == "a process (pid 3328327, 50119 MB)"
    assert {chip[:2] for chip in chips} == {("Ascend910 of 64 GiB", "OK")}


def test_release_of_a_version() -> None:
    found = [release(v) for v in ("2.7.1.post11", "2.13.0+cpu", "8.5.0.alpha003", "8.3.RC1", "9.2.0-beta.2", "x")]
    assert found == [(2, 7, 1), (2, 13, 0), (8, 5, 0), (8, 3), (9, 2, 0), ()]
