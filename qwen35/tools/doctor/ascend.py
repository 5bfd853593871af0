"""CANN, the driver and the NPUs, from their files and npu-smi, without using a device."""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from qwen35.tools.doctor.machine import Finding, Machine, architecture, first_match, note, ok, release, wrong
from qwen35.tools.doctor.software import torch_npu
from qwen35.tools.doctor.stack import WITHOUT_TRITON, cann_version, of_cann, of_torch_npu, supported
from qwen35.tools.doctor.triton import triton

CANN_IMPORTS = "attrs cffi cloudpickle decorator numpy protobuf psutil scipy sympy".split()
CANN_BELOW = {"numpy": 2, "protobuf": 4}  # CANN needs older major versions than these
DRIVER_DEVICES = ("davinci_manager", "devmm_svm", "hisi_hdc")
SMI_SECONDS = 30


def ascend(m: Machine) -> list[Finding]:
    """What a run on NPUs needs beyond a run on the host."""
    return [*torch_npu(m), *cann(m), *pair(m), *triton(m), *cann_packages(m), *driver(m), *npus(m)]


def cann(m: Machine) -> list[Finding]:
    home = Path(m.get("ASCEND_HOME_PATH") or "nowhere")
    if not home.is_dir():
        fact = f"no set_env.sh in {m.get('CANN_PATH') or '/usr/local/Ascend'}, nor in cann/ or ascend-toolkit/ below it"
        return [wrong("CANN", fact, f"install CANN ({supported()}), or set CANN_PATH to where it is")]
    version = cann_version(home)
    if version is None:
        return [wrong("CANN", f"{home} does not say its version", f"install CANN again, one of {supported()}")]
    if not of_cann(version):
        fact = f"{version} in {home}: there is no known torch_npu for it"
        return [wrong("CANN", fact, f"install one of CANN {supported()}")]
    findings = [ok("CANN", f"{version} in {home}")]
    operators = home / f"{architecture()}-linux/ascend_ops_install.info"
    if not operators.is_file():
        todo = "check that CANN's package of operators for this chip is installed (Ascend-cann-…-ops)"
        findings.append(note("CANN", f"no {operators}", todo))
    elif (other := first_match(operators, r"^version=(\S+)")) != version:
        fact = f"{version}, but its operators are of {other}"
        findings.append(wrong("CANN", fact, "install the package of operators of the same version"))
    return findings


def pair(m: Machine) -> list[Finding]:
    """Whether torch_npu and triton-ascend fit this CANN, by scripts/requirements/versions.txt."""
    found, home = m.package("torch-npu"), m.get("ASCEND_HOME_PATH")
    version = cann_version(Path(home)) if home else None
    rows = of_cann(version) if version else []
    if not found or not rows:
        return []  # another check reports it
    subject, cann, todo = "torch-npu", rows[0].cann, f"make install DEVICE=npu installs {rows[0].torch_npu}"
    known = of_torch_npu(found.version)
    if known is None:
        return [wrong(subject, f"{found.version} is for no known CANN, this is {version}", todo)]
    stack = next((row for row in rows if row.torch_npu == known.torch_npu), rows[0])
    findings = [ok(subject, f"{found.version} fits CANN {version}")]
    if known.cann != cann:  # TorchNPU's release notes: each release from 7.3 to 26.2 with each CANN from 8.5 to 9.2
        fact = f"{found.version} is for CANN {known.cann}, this is {version}; its release notes call them compatible"
        findings = [note(subject, fact, todo)]
    subject, has = "triton-ascend", m.package("triton-ascend")
    if has is None:
        fact, todo = stack.no_triton(m.python_version) or ("is not installed", "make install DEVICE=npu")
        findings.append(note(subject, fact, todo))
    elif release(has.version) != release(stack.triton_ascend):
        todo = f"install {stack.triton_ascend}, or uninstall it and choose {WITHOUT_TRITON}"
        findings.append(wrong(subject, f"{has.version} does not fit CANN {version}", todo))
    else:
        findings.append(ok(subject, f"{has.version} fits CANN {version}"))
    return findings


def cann_packages(m: Machine) -> list[Finding]:
    """What CANN's own Python code imports from this environment."""
    found = {name: package.version for name in CANN_IMPORTS if (package := m.package(name))}
    missing = [name for name in CANN_IMPORTS if name not in found]
    if missing:
        return [wrong("CANN's imports", f"{', '.join(missing)} missing", "make install DEVICE=npu")]
    new = [f"{name} {found[name]}" for name, below in CANN_BELOW.items() if release(found[name]) >= (below,)]
    if new:
        below = ", ".join(f"{name}<{number}" for name, number in CANN_BELOW.items())
        return [wrong("CANN's imports", f"{', '.join(new)}: CANN needs {below}", "make install DEVICE=npu")]
    return [ok("CANN's imports", "all installed")]


def driver(m: Machine) -> list[Finding]:
    where = first_match(m.files / "etc/ascend_install.info", r"^Driver_Install_Path_Param=(\S+)") or "/usr/local/Ascend"
    file = m.files / where.lstrip("/") / "driver/version.info"
    version = first_match(file, r"^Version=(\S+)")
    if version is None:
        todo = "install the NPU driver, or mount it into the container"
        return [wrong("driver", f"no version in {file}", todo)]
    findings = [ok("driver", version)]
    if missing := [name for name in DRIVER_DEVICES if not (m.files / "dev" / name).exists()]:
        flags = " ".join(f"--device /dev/{name}" for name in missing)
        findings.append(wrong("driver", f"no /dev/{', /dev/'.join(missing)}", f"start the container with {flags}"))
    return findings


@dataclass
class Chip:
    """An NPU as npu-smi shows it."""

    name: str
    health: str
    memory: int = 0  # MB of HBM
    users: list[str] = field(default_factory=list)  # "python3 (pid 4321, 30000 MB)"


def npus(m: Machine) -> list[Finding]:
    """Which NPUs exist, which of them a run may use, and which of those are free."""
    present, visible = m.npus(), m.visible()
    if not present:
        todo = "install the driver; start a container with --device /dev/davinci0 and so on"
        return [wrong("NPUs", "no /dev/davinci0", todo)]
    chosen = m.get("ASCEND_RT_VISIBLE_DEVICES")
    if len(set(visible)) != len(visible) or any(number >= len(present) for number in visible if chosen):
        fact = f"ASCEND_RT_VISIBLE_DEVICES={chosen}, but there are {len(present)}"
        return [wrong("NPUs", fact, f"numbers from 0 to {len(present) - 1}, each once")]
    findings = []
    asked = m.number("NPUS_PER_NODE", len(visible))
    if asked > len(visible):
        fact = f"NPUS_PER_NODE={asked}, but {len(visible)} {'is' if len(visible) == 1 else 'are'} visible"
        findings.append(wrong("NPUs", fact, f"at most {len(visible)}"))
    chips = smi(m)
    if isinstance(chips, Finding):
        return [*findings, ok("NPUs", f"{len(visible)} of {len(present)} visible"), chips]
    # programs number the NPUs by their order in npu-smi's table, from 0
    shown = [(n, chips[n if chosen else i]) for i, n in enumerate(visible) if (n if chosen else i) < len(chips)]
    kinds = sorted({f"{chip.name} of {chip.memory / 1024:.0f} GiB" for _, chip in shown})
    busy = {n: chip for n, chip in shown if chip.users}
    fact = f"{len(visible)} of {len(present)} visible, {len(visible) - len(busy)} free; {', '.join(kinds)}"
    findings.append(ok("NPUs", fact))
    for n, chip in shown:
        if chip.health != "OK":
            todo = "see npu-smi info -t health, or leave it out of ASCEND_RT_VISIBLE_DEVICES"
            findings.append(wrong(f"NPU {n}", f"npu-smi says {chip.health}", todo))
        if chip.users:
            free = ",".join(str(k) for k, _ in shown if k not in busy)
            todo = f"ASCEND_RT_VISIBLE_DEVICES={free} leaves it out" if free else "wait until it is free"
            findings.append(note(f"NPU {n}", f"in use by {', '.join(chip.users)}", todo))
    return findings


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
            chip = chips.get((words[0], words[1]))
            if chip:
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
