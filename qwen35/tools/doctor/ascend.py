"""CANN, the driver and the NPUs, from their files and npu-smi, without using a device."""

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qwen35.tools.doctor.host import Finding, Machine, note, ok, wrong
from qwen35.tools.stack import WITHOUT_TRITON, cann_version, first_match, of_cann, of_torch_npu, release, supported
from qwen35.tools.triton import triton

NPU = "make install DEVICE=npu"
CANN_BELOW = {"numpy": 2, "protobuf": 4}  # CANN's Python code needs older major versions than these
DRIVER_DEVICES = ("davinci_manager", "devmm_svm", "hisi_hdc")
SMI_SECONDS = 30


def ascend(m: Machine) -> list[Finding]:
    """What a run on NPUs needs beyond a run on the host."""
    return [*cann(m), *packages(m), *triton(m), driver(m), *npus(m)]


def cann(m: Machine) -> Iterator[Finding]:
    home = Path(m.get("ASCEND_HOME_PATH") or "nowhere")
    version = cann_version(home)
    if not home.is_dir():
        fact = f"no set_env.sh in {m.get('CANN_PATH') or '/usr/local/Ascend'}, nor in cann/ or ascend-toolkit/ below it"
        yield wrong("CANN", fact, f"install CANN ({supported()}), or set CANN_PATH to where it is")
    elif version is None:
        yield wrong("CANN", f"{home} does not say its version", f"install CANN again, one of {supported()}")
    elif not of_cann(version):
        fact = f"{version} in {home}: there is no known torch_npu for it"
        yield wrong("CANN", fact, f"install one of CANN {supported()}")
    else:
        yield ok("CANN", f"{version} in {home}")
        operators = home / f"{platform.machine()}-linux/ascend_ops_install.info"
        if not operators.is_file():
            todo = "check that CANN's package of operators for this chip is installed (Ascend-cann-…-ops)"
            yield note("CANN", f"no {operators}", todo)
        elif (other := first_match(operators, r"^version=(\S+)")) != version:
            fact = f"{version}, but its operators are of {other}"
            yield wrong("CANN", fact, "install the package of operators of the same version")


def packages(m: Machine) -> Iterator[Finding]:
    """Whether torch_npu and triton-ascend fit this CANN, by scripts/requirements/versions.txt."""
    versions = {
        name: found.version for name in ("torch-npu", "triton-ascend", *CANN_BELOW) if (found := m.package(name))
    }
    torch_npu, triton_ascend = versions.get("torch-npu"), versions.get("triton-ascend")
    if torch_npu is None:
        yield wrong("torch-npu", "is not installed", NPU)
        return
    if new := [f"{n} {versions[n]}" for n, below in CANN_BELOW.items() if release(versions.get(n, "0")) >= (below,)]:
        yield wrong("CANN's imports", f"{', '.join(new)}: CANN needs numpy<2, protobuf<4", NPU)
    if m.package("triton") and triton_ascend and release(triton_ascend) < (3, 2, 1):  # later ones require triton
        todo = f"{m.python} -m pip uninstall triton triton-ascend, then make install"
        yield wrong("triton-ascend", "triton is installed too and overwrites its files", todo)
    version = cann_version(Path(m.get("ASCEND_HOME_PATH") or "nowhere"))
    if not version or not (rows := of_cann(version)):
        return  # cann() reports it
    known, todo = of_torch_npu(torch_npu), f"{NPU} installs {rows[0].torch_npu}"
    stack = known if known in rows else rows[0]
    if known is None:
        yield wrong("torch-npu", f"{torch_npu} is for no known CANN, this is {version}", todo)
        return
    if known in rows:
        yield ok("torch-npu", f"{torch_npu} fits CANN {version}")
    else:  # TorchNPU's release notes: each release from 7.3 to 26.2 with each CANN from 8.5 to 9.2
        fact = f"{torch_npu} is for CANN {known.cann}, this is {version}; its release notes call them compatible"
        yield note("torch-npu", fact, todo)
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
    if missing := [name for name in DRIVER_DEVICES if not (m.files / "dev" / name).exists()]:
        flags = " ".join(f"--device /dev/{name}" for name in missing)
        return wrong("driver", f"no /dev/{', /dev/'.join(missing)}", f"start the container with {flags}")
    return ok("driver", version)


@dataclass
class Chip:
    """An NPU as npu-smi shows it."""

    name: str
    health: str
    memory: int = 0  # MB of HBM
    users: list[str] = field(default_factory=list)  # "python3 (pid 4321, 30000 MB)"


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
    chips = smi(m)
    if isinstance(chips, Finding):
        yield ok("NPUs", f"{len(visible)} of {present} visible")
        yield chips
        return
    # programs number the NPUs by their order in npu-smi's table, from 0
    shown = [(n, chips[n if chosen else i]) for i, n in enumerate(visible) if (n if chosen else i) < len(chips)]
    kinds = ", ".join(sorted({f"{chip.name} of {chip.memory / 1024:.0f} GiB" for _, chip in shown}))
    free = [n for n, chip in shown if not chip.users]
    yield ok("NPUs", f"{len(visible)} of {present} visible, {len(free)} free; {kinds}")
    for n, chip in shown:
        if chip.health != "OK":
            todo = "see npu-smi info -t health, or leave it out of ASCEND_RT_VISIBLE_DEVICES"
            yield wrong(f"NPU {n}", f"npu-smi says {chip.health}", todo)
        if chip.users:
            without = f"ASCEND_RT_VISIBLE_DEVICES={','.join(map(str, free))} leaves it out"
            yield note(f"NPU {n}", f"in use by {', '.join(chip.users)}", without if free else "wait until it is free")


def smi(m: Machine) -> list[Chip] | Finding:
    """The NPUs in the order of npu-smi's table, or a finding that says why there is no table."""
    program = shutil.which("npu-smi", path=m.get("PATH"))
    if program is None:
        return note("npu-smi", "is not on PATH: whether the NPUs are in use is not known", "it comes with the driver")
    try:
        done = subprocess.run(
            [program, "info"], capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return wrong("npu-smi", f"no answer in {SMI_SECONDS} s", "the driver hangs: restart it, or the machine")
    chips = read_table(done.stdout)
    if done.returncode or not chips:
        words = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        return wrong("npu-smi", f"info fails: {words}", "check that the driver runs and that this user may use it")
    return chips


def read_table(text: str) -> list[Chip]:
    """Parse `npu-smi info`.

    It has two lines for each chip, with name and health, then bus and memory, and below them the
    processes by NPU and chip.
    """
    chips: dict[tuple[str, str], Chip] = {}  # (NPU, chip)
    head: tuple[str, Chip] | None = None
    in_processes = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        words = cells[0].split()
        in_processes |= len(cells) == 4 and cells[1] == "Process id"
        if in_processes and len(cells) == 4 and cells[1].isdecimal() and len(words) == 2:
            if chip := chips.get((words[0], words[1])):
                chip.users.append(f"{cells[2] or 'a process'} (pid {cells[1]}, {cells[3]} MB)")
        elif len(cells) == 3 and words and words[0].isdecimal():
            if len(words) > 1 and not re.match(r"[0-9A-Fa-f]{4}:", cells[1]):
                head = (words[0], Chip(words[1], cells[1]))
            elif head:
                used = re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])
                head[1].memory = int(used[-1][1]) if used else 0
                chips[head[0], words[0]] = head[1]
                head = None
    return list(chips.values())
