"""Python, the installed packages, and whether torch and our own `kernels` can be imported."""

import json
import re
import subprocess

from qwen35.tools.doctor.machine import Finding, Machine, note, ok, release, wrong
from qwen35.tools.doctor.stack import of_torch_npu

PYTHONS = ((3, 10), (3, 12))
RANGES = {"torch": ("2.7.1", "2.13"), "transformers": ("5.2", "5.23")}  # that the tests have run on
PROBE = """
import json, sys, torch, kernels
from qwen35.device import device_count
json.dump([torch.__version__, kernels.__version__, kernels.__file__, device_count()], sys.stdout)
"""
PROBE_SECONDS = 120
INSTALL = "make install"
IMPORT = "import torch"


def python(m: Machine) -> list[Finding]:
    version = ".".join(map(str, m.python_version))
    if PYTHONS[0] <= m.python_version[:2] <= PYTHONS[1]:
        return [ok("Python", f"{version}, {m.python}")]
    return [wrong("Python", f"{version}, {m.python}: not 3.10 to 3.12", "choose another: PYTHON=… make install")]


def installation(m: Machine) -> list[Finding]:
    """Whether .venv has what the lock file pins. If not, nothing else can be checked."""
    stamp = m.root / ".venv/.installed"
    if not stamp.is_file():
        half = (m.root / ".venv").is_dir()
        return [wrong("installation", "incomplete" if half else "there is none yet", INSTALL)]
    device, arch, torch_npu, *_ = [*stamp.read_text().split("-"), "", ""]
    locks = [m.root / f"scripts/requirements/{name}.txt" for name in (f"{device}-{arch}", device)]
    lock = next((file for file in locks if file.is_file()), None)
    pinned, stack = lock.read_text() if lock else "", of_torch_npu(torch_npu)
    if lock is None or ("torch-npu==" in pinned and stack is None):
        return [wrong("installation", f"{stamp} names no lock file", INSTALL)]
    try:
        from packaging.markers import Marker
    except ModuleNotFoundError:
        return [wrong("installation", "packaging is missing", INSTALL)]
    missing, others = [], []
    pins = 0
    for line in (stack.pins(pinned) if stack else pinned).splitlines():
        pin, _, marker = line.partition(" ; ")
        if line.startswith("#") or (marker and not Marker(marker).evaluate()):
            continue
        pins += 1
        name, _, version = pin.partition("==")
        found = m.package(name)
        if found is None:
            missing.append(name)
        elif found.version != version and found.version.partition("+")[0] != version:
            others.append(f"{name} {found.version} ({version})")
    if missing:
        return [wrong("installation", f"{_few(missing)} of {lock.name} missing", INSTALL)]
    if others:
        fact = f"other versions than {lock.name} pins: {_few(others)}"
        return [note("installation", fact, "make install restores the pinned versions")]
    return [ok("installation", f"all {pins} packages have the versions in {lock.name}")]


def ourselves(m: Machine) -> list[Finding]:
    """Whether `mm-convert` in .venv is this folder's."""
    package = m.package("qwen35")
    if package is None:
        return [wrong("qwen35", "is not installed", INSTALL)]
    url = json.loads(package.read_text("direct_url.json") or "{}").get("url", "elsewhere")
    if url != m.root.resolve().as_uri():
        return [note("qwen35", f"mm-convert is the one in {url}", "make install installs this folder's")]
    return [ok("qwen35", "mm-convert is this folder's")]


def versions(m: Machine) -> list[Finding]:
    findings = []
    for name, (low, high) in RANGES.items():
        found = m.package(name)
        if found is None:
            findings.append(wrong(name, "is not installed", INSTALL))
        elif release(low) <= release(found.version) and release(found.version)[:2] <= release(high):
            findings.append(ok(name, found.version))
        else:
            fact = f"{found.version}: this code needs {low} to {high}"
            findings.append(wrong(name, fact, f"{INSTALL} installs the tested version"))
    return findings


def imports(m: Machine) -> list[Finding]:
    """Import torch and `kernels` in a subprocess, since an incompatible library may crash it."""
    try:
        done = subprocess.run(
            [m.python, "-c", PROBE],
            cwd=m.root,
            env=dict(m.environment),
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [wrong(IMPORT, f"takes more than {PROBE_SECONDS} s", "if the driver hangs, so does npu-smi info")]
    if done.returncode:
        words = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        todo = "see the lines about CANN and the driver" if m.accelerator else INSTALL
        return [wrong(IMPORT, words, todo)]
    version, ours, where, devices = json.loads(done.stdout.splitlines()[-1])
    return [ok(IMPORT, version), *_kernels(m, ours, where), *_sees(m, devices)]


def _kernels(m: Machine, version: str, where: str) -> list[Finding]:
    """transformers looks for Hugging Face's `kernels`, finds ours, and ignores version 0.0.0."""
    if not where.startswith(str(m.root / "kernels")):
        return [wrong("kernels", f"import kernels finds {where}", "remove it, or start in the project's folder")]
    if version != "0.0.0":
        return [
            wrong("kernels", f"has __version__ {version!r}", 'it must be "0.0.0", or transformers uses it as its own')
        ]
    hub = m.package("kernels")
    if hub is not None:
        fact = f"Hugging Face's package of that name, {hub.version}, is installed: outside this folder it hides ours"
        return [wrong("kernels", fact, f"{m.python} -m pip uninstall kernels")]
    return [ok("kernels", "this project's, which transformers ignores")]


def _sees(m: Machine, devices: int) -> list[Finding]:
    if not m.accelerator:
        return []
    visible = len(m.visible())
    if devices == visible and devices:
        return [ok("torch", f"sees {devices} NPUs")]
    return [wrong("torch", f"sees {devices} of {visible} NPUs", "see the lines about CANN, the driver and torch-npu")]


def torch_npu(m: Machine) -> list[Finding]:
    """Whether torch_npu is the release for the installed torch, which it names."""
    found, torch = m.package("torch-npu"), m.package("torch")
    if found is None:
        return [wrong("torch-npu", "is not installed", "make install DEVICE=npu")]
    findings = []
    needs = next((r for line in found.requires or [] if (r := re.match(r"torch\s*\(?==\s*([\w.+]+)", line))), None)
    has = torch.version if torch else "none"
    if needs and needs[1] not in (has, has.partition("+")[0]):
        fact = f"{found.version} is made for torch {needs[1]}, but {has} is installed"
        findings.append(wrong("torch-npu", fact, "make install DEVICE=npu"))
    else:
        findings.append(ok("torch-npu", f"{found.version} for torch {has}"))
    ascend = m.package("triton-ascend")
    is_alone = ascend and release(ascend.version) < (3, 2, 1)  # later ones require triton and overwrite its files
    if m.package("triton") and is_alone:
        todo = f"{m.python} -m pip uninstall triton triton-ascend, then make install"
        findings.append(wrong("triton-ascend", "triton is installed too and overwrites its files", todo))
    return findings


def _few(words: list[str]) -> str:
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
