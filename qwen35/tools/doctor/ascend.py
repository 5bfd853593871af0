"""CANN, the driver and the NPUs, from their files and npu-smi, without using a device."""

import platform
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from qwen35.tools.doctor.host import Finding, Machine, note, ok, wrong
from qwen35.tools.stack import WITHOUT_TRITON, cann_version, first_match, of_cann, of_torch_npu, release, supported
from qwen35.tools.triton import triton

NPU = "make install DEVICE=npu"
CANN_BELOW = {"numpy": 2, "protobuf": 4}  # CANN's Python code needs older major versions than these
DRIVER_DEVICES = ("davinci_manager", "devmm_svm", "hisi_hdc")
# What `npu-smi info` prints: two lines for each chip, with NPU, name and health, then chip, bus and
# memory, and below them the processes by NPU and chip.
CHIP = re.compile(
    r"^\| *(\d+) +([^ |]+) *\| *(.*?) *\|.*\n\| *(\d+)\b[^|]*\| *[0-9A-Fa-f]{4}:.*/ *(\d+) *\|", re.MULTILINE
)
PROCESS = re.compile(r"^\| *(\d+) +(\d+) *\| *(\d+) *\| *(.*?) *\| *(\d+) *\|", re.MULTILINE)


def ascend(m: Machine) -> list[Finding]:
    """What a run on NPUs needs beyond a run on the host."""
    return [*cann(m), *packages(m), *triton(m), driver(m), *npus(m)]


def cann(m: Machine) -> Iterator[Finding]:
    home, todo = Path(m.get("ASCEND_HOME_PATH") or "nowhere"), f"install one of CANN {supported()}"
    version, place = cann_version(home), m.get("CANN_PATH") or "/usr/local/Ascend"
    operators = home / f"{platform.machine()}-linux/ascend_ops_install.info"
    if not home.is_dir():
        fact = f"no set_env.sh in {place}, nor in cann/ or ascend-toolkit/ below it"
        yield wrong("CANN", fact, f"{todo}, or set CANN_PATH to where it is")
    elif not version:
        yield wrong("CANN", f"{home} does not say its version", todo)
    elif not of_cann(version):
        yield wrong("CANN", f"{version} in {home}: there is no known torch_npu for it", todo)
    else:
        yield ok("CANN", f"{version} in {home}")
        if not operators.is_file():
            todo = "check that CANN's package of operators for this chip is installed (Ascend-cann-…-ops)"
            yield note("CANN", f"no {operators}", todo)
        elif (other := first_match(operators, r"^version=(\S+)")) != version:
            todo = "install the package of operators of the same version"
            yield wrong("CANN", f"{version}, but its operators are of {other}", todo)


def packages(m: Machine) -> Iterator[Finding]:
    """Whether torch_npu and triton-ascend fit this CANN, by scripts/requirements/versions.txt."""
    names = ("torch-npu", "triton-ascend", "triton", *CANN_BELOW)
    versions = {name: found.version for name in names if (found := m.package(name))}
    torch_npu, triton_ascend = versions.get("torch-npu"), versions.get("triton-ascend")
    if torch_npu is None:
        yield wrong("torch-npu", "is not installed", NPU)
        return
    if new := [f"{n} {versions[n]}" for n, below in CANN_BELOW.items() if release(versions.get(n, "0")) >= (below,)]:
        yield wrong("CANN's imports", f"{', '.join(new)}: CANN needs numpy<2, protobuf<4", NPU)
    if "triton" in versions and triton_ascend and release(triton_ascend) < (3, 2, 1):  # later ones require triton
        todo = f"{m.python} -m pip uninstall triton triton-ascend, then make install"
        yield wrong("triton-ascend", "triton is installed too and overwrites its files", todo)
    version = cann_version(Path(m.get("ASCEND_HOME_PATH") or "nowhere"))
    if not version or not (rows := of_cann(version)):
        return  # cann() reports it
    known, todo = of_torch_npu(torch_npu), f"{NPU} installs {rows[0].torch_npu}"
    if known is None:
        yield wrong("torch-npu", f"{torch_npu} is for no known CANN, this is {version}", todo)
        return
    if known in rows:
        yield ok("torch-npu", f"{torch_npu} fits CANN {version}")
    else:  # TorchNPU's release notes: each release from 7.3 to 26.2 with each CANN from 8.5 to 9.2
        fact = f"{torch_npu} is for CANN {known.cann}, this is {version}; its release notes call them compatible"
        yield note("torch-npu", fact, todo)
    stack = known if known in rows else rows[0]
    if triton_ascend is None:
        yield note("triton-ascend", *(stack.no_triton(m.python_version) or ("is not installed", NPU)))
    elif release(triton_ascend) == release(stack.triton_ascend):
        yield ok("triton-ascend", f"{triton_ascend} fits CANN {version}")
    else:
        todo = f"install {stack.triton_ascend}, or uninstall it and choose {WITHOUT_TRITON}"
        yield wrong("triton-ascend", f"{triton_ascend} does not fit CANN {version}", todo)


def driver(m: Machine) -> Finding:
    where = first_match(m.files / "etc/ascend_install.info", r"^Driver_Install_Path_Param=(\S+)") or "/usr/local/Ascend"
    file = m.files / where.lstrip("/") / "driver/version.info"
    if not (version := first_match(file, r"^Version=(\S+)")):
        return wrong("driver", f"no version in {file}", "install the NPU driver, or mount it into the container")
    if missing := [f"/dev/{name}" for name in DRIVER_DEVICES if not (m.files / "dev" / name).exists()]:
        todo = f"start the container with --device {' --device '.join(missing)}"
        return wrong("driver", f"no {', '.join(missing)}", todo)
    return ok("driver", version)


def npus(m: Machine) -> Iterator[Finding]:
    """Which NPUs exist, which of them a run may use, and which of those are free."""
    present, visible, chosen = len(m.npus()), m.visible(), m.get("ASCEND_RT_VISIBLE_DEVICES")
    if not present:
        yield wrong("NPUs", "no /dev/davinci0", "install the driver; start a container with --device /dev/davinci0 …")
        return
    if len(set(visible)) != len(visible) or any(number >= present for number in visible if chosen):
        fact = f"ASCEND_RT_VISIBLE_DEVICES={chosen}, but there are {present}"
        yield wrong("NPUs", fact, f"numbers from 0 to {present - 1}, each once")
        return
    if (asked := m.number("NPUS_PER_NODE", 0)) > len(visible):
        fact = f"NPUS_PER_NODE={asked}, but {len(visible)} {'is' if len(visible) == 1 else 'are'} visible"
        yield wrong("NPUs", fact, f"at most {len(visible)}")
    program = shutil.which("npu-smi", path=m.get("PATH"))
    table, failure = m.ask("npu-smi", program, "info") if program else ("", "")
    chips = [] if failure else read_table(table)
    # programs number the NPUs by their order in npu-smi's table, from 0
    shown = [(n, *chips[n if chosen else i]) for i, n in enumerate(visible) if (n if chosen else i) < len(chips)]
    free = [n for n, _, _, users in shown if not users]
    about = f", {len(free)} free; {', '.join(sorted({kind for _, kind, _, _ in shown}))}" if chips else ""
    yield ok("NPUs", f"{len(visible)} of {present} visible{about}")
    if not program:
        yield note("npu-smi", "is not on PATH: whether NPUs are in use is not known", "it comes with the driver")
    elif not chips:
        todo = "check that the driver runs, and that this user may use it"
        yield wrong("npu-smi", failure or "info shows no NPU", todo)
    for n, _, health, users in shown:
        if health != "OK":
            todo = "see npu-smi info -t health, or leave it out of ASCEND_RT_VISIBLE_DEVICES"
            yield wrong(f"NPU {n}", f"npu-smi says {health}", todo)
        if users:
            without = f"ASCEND_RT_VISIBLE_DEVICES={','.join(map(str, free))} leaves it out"
            yield note(f"NPU {n}", f"in use by {', '.join(users)}", without if free else "wait until it is free")


def read_table(text: str) -> list[tuple[str, str, list[str]]]:
    """What each chip is, its health, and the processes that use it, in npu-smi's order."""
    users = defaultdict(list)
    for npu, chip, pid, program, size in PROCESS.findall(text):
        users[npu, chip].append(f"{program or 'a process'} (pid {pid}, {size} MB)")
    return [
        (f"{name} of {int(size) / 1024:.0f} GiB", health, users[npu, chip])
        for npu, name, health, chip, size in CHIP.findall(text)
    ]
