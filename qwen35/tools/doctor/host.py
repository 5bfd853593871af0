"""The machine that is checked: its installation, memory, disks, port and network interfaces.

Only the standard library is imported, so that it runs before installation.
"""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal

from qwen35.tools.stack import TESTED, is_tested, of_torch_npu

PYTHONS = ((3, 10), (3, 12))
PROBE = """
import json, sys, torch, kernels
from qwen35.device import device_count
json.dump([torch.__version__, device_count()], sys.stdout)
"""
PROBE_SECONDS = 120
INSTALL = "make install"
GIB = 2**30
MIN_MEMORY = 2 * GIB  # a process that only imports torch takes half of that
OPEN_FILES = 1024  # every tensor on its way from a data loader is an open file


@dataclass(frozen=True)
class Finding:
    status: Literal["ok", "wrong", "note"]
    subject: str
    fact: str
    todo: str = ""  # what the user can do about it


def ok(subject: str, fact: str) -> Finding:
    return Finding("ok", subject, fact)


def note(subject: str, fact: str, todo: str = "") -> Finding:
    return Finding("note", subject, fact, todo)


def wrong(subject: str, fact: str, todo: str) -> Finding:
    return Finding("wrong", subject, fact, todo)


def few(words: list[str]) -> str:
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


@dataclass(frozen=True)
class Machine:
    """This machine, or one that a test describes."""

    accelerator: str | None = None  # torch's device type of this installation; None: the host
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)  # as scripts/doctor.sh exported it
    root: Path = field(default_factory=Path.cwd)  # the project's folder
    files: Path = Path("/")  # the root of dev, proc, sys, etc and usr/local/Ascend
    site: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path))  # where packages are installed
    python: str = sys.executable
    python_version: tuple[int, ...] = tuple(sys.version_info[:3])
    include: str = sysconfig.get_path("include", "posix_prefix")  # of Python.h, as triton-ascend finds it

    def get(self, name: str) -> str:
        return self.environment.get(name, "")

    def number(self, name: str, default: int) -> int:
        """A variable of env.sh as a number; the default if it is none, which env.sh reports."""
        value = self.get(name)
        return int(value) if value.isdecimal() else default

    def package(self, name: str) -> Distribution | None:
        return next(iter(distributions(name=name, path=list(self.site))), None)

    def npus(self) -> list[int]:
        """The numbers of the NPUs that have a device file."""
        nodes = (path.name.removeprefix("davinci") for path in (self.files / "dev").glob("davinci*"))
        return sorted(int(number) for number in nodes if number.isdecimal())

    def visible(self) -> list[int]:
        """The NPUs that a run may use."""
        chosen = self.get("ASCEND_RT_VISIBLE_DEVICES")
        return [int(word) for word in chosen.split(",") if word.isdecimal()] if chosen else self.npus()

    def processes(self) -> int:
        """Of a run on this machine, as scripts/finetune.sh counts them."""
        return self.number("NPUS_PER_NODE", (len(self.visible()) or 1) if self.accelerator else 2)


def installation(m: Machine) -> Iterator[Finding]:
    """Whether .venv has what the lock file pins. Otherwise nothing that needs it can be checked."""
    version = f"{'.'.join(map(str, m.python_version))}, {m.python}"
    if not PYTHONS[0] <= m.python_version[:2] <= PYTHONS[1]:
        yield wrong("Python", f"{version}: not 3.10 to 3.12", "choose another: PYTHON=… make install")
        return
    yield ok("Python", version)
    stamp = m.root / ".venv/.installed"
    device, arch, torch_npu, *_ = [*(stamp.read_text() if stamp.is_file() else "").split("-"), "", ""]
    locks = [m.root / f"scripts/requirements/{name}.txt" for name in (f"{device}-{arch}", device)]
    lock = next((file for file in locks if file.is_file()), None)
    pinned, stack = lock.read_text() if lock else "", of_torch_npu(torch_npu)
    if lock is None or ("torch-npu==" in pinned and stack is None):
        half = "incomplete" if stamp.parent.is_dir() else "there is none yet"
        yield wrong("installation", f"{stamp} names no lock file" if device else half, INSTALL)
        return
    try:
        from packaging.markers import Marker
    except ModuleNotFoundError:
        yield wrong("installation", "packaging is missing", INSTALL)
        return
    lines = [
        line.partition(" ; ") for line in (stack.pins(pinned) if stack else pinned).splitlines() if line[:1] != "#"
    ]
    pins = dict(pin.split("==") for pin, _, marker in lines if not marker or Marker(marker).evaluate())
    found = {name: package.version for name in (*pins, "qwen35") if (package := m.package(name))}
    others = [
        f"{n} {found[n]} ({v})"
        for n, v in pins.items()
        if n in found and v not in (found[n], found[n].partition("+")[0])
    ]
    if missing := [name for name in (*pins, "qwen35") if name not in found]:
        yield wrong("installation", f"{few(missing)} of {lock.name} missing", INSTALL)
        return
    for name, (oldest, newest) in TESTED.items():
        if not is_tested(name, found[name]):
            yield wrong(name, f"{found[name]}: the code is for {oldest} to {newest}", INSTALL)
    if others:
        fact = f"other versions than {lock.name} pins, which the tests have run on: {few(others)}"
        yield note("installation", fact, "make install restores the pinned versions")
    else:
        yield ok("installation", f"all {len(pins)} packages have the versions in {lock.name}")
    ours = m.package("qwen35")
    url = json.loads((ours and ours.read_text("direct_url.json")) or "{}").get("url", "elsewhere")
    if url != m.root.resolve().as_uri():
        yield note("qwen35", f"mm-convert is the one in {url}", "make install installs this folder's")


def imports(m: Machine) -> Finding:
    """Import torch and `kernels` in a subprocess, since an incompatible library may crash it."""
    command, subject = [m.python, "-c", PROBE], "import torch"
    try:
        done = subprocess.run(
            command,
            cwd=m.root,
            env=dict(m.environment),
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return wrong(subject, f"takes more than {PROBE_SECONDS} s", "if the driver hangs, so does npu-smi info")
    if done.returncode:
        words = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return wrong(subject, words, "see the lines about CANN and the driver" if m.accelerator else INSTALL)
    (version, devices), visible = json.loads(done.stdout.splitlines()[-1]), len(m.visible())
    if m.accelerator and not 0 < devices == visible:
        return wrong(subject, f"sees {devices} of {visible} NPUs", "see the lines about CANN, driver and torch-npu")
    return ok(subject, version + (f", sees {devices} NPUs" if m.accelerator else ""))


def host(m: Machine) -> Iterator[Finding]:
    text = (m.files / "proc/meminfo").read_text()
    kibibytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    total, available = (int(kibibytes[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    fact = f"{gib(available)} of {gib(total)} available"
    yield ok("memory", fact) if available >= MIN_MEMORY else wrong("memory", fact, "end other programs")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        yield wrong("open files", f"at most {soft} a process", f"ulimit -n {OPEN_FILES}, before the run")
    number = m.number("MASTER_PORT", 6000)
    try:
        # only node 0 listens, and a single node finds a free port by itself
        if m.number("NODE_RANK", 0) == 0 and (m.number("NODES", 1) > 1 or m.get("MASTER_PORT")):
            socket.create_server(("", number)).close()
    except OSError as error:
        yield wrong("port", f"MASTER_PORT={number}: {error.strerror}", f"try MASTER_PORT={number % 65535 + 1}")
    need = sum(file.stat().st_size for file in Path(m.get("HF") or "nowhere").glob("*.safetensors"))
    for name in ("CONVERT_DCP", "EXPORT_OUT"):  # make convert and make export write as many bytes as the model has
        if m.get(name):
            yield disk(name, Path(m.get(name)), need)
    yield from interfaces(m)


def disk(subject: str, folder: Path, need: int = 0) -> Finding:
    """Whether `need` bytes can be written into a folder, which may not exist yet."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "cannot be written" if existing.is_dir() else "is not a folder"
        return wrong(subject, f"{existing} {why}", "name another folder, or make it this user's")
    free = shutil.disk_usage(existing).free
    fact = f"{gib(free)} free for {folder}" + (f", which takes {gib(need)}" if need else "")
    return ok(subject, fact) if free >= need else wrong(subject, fact, "free some space, or name another folder")


def interfaces(m: Machine) -> Iterator[Finding]:
    """Addresses and interfaces of this machine that variables name.

    gloo takes full names, all of which must exist. HCCL takes prefixes of names, full names after
    "=", and excludes those after "^".
    """
    names = sorted(path.name for path in (m.files / "sys/class/net").glob("*"))
    todo = f"there are {', '.join(names)}"
    for name in ("NODE_ADDR", "HCCL_IF_IP") if m.accelerator else ("NODE_ADDR",):
        if (value := m.get(name)) and not _is_own(value):
            yield wrong(name, f"{value} is not an address of this machine", "see: ip address")
    if missing := [n for n in m.get("GLOO_SOCKET_IFNAME").split(",") if n and n not in names]:
        yield wrong("GLOO_SOCKET_IFNAME", f"no interface {', '.join(missing)}", todo)
    if m.accelerator and (pattern := m.get("HCCL_SOCKET_IFNAME")):
        words = tuple(pattern.lstrip("^=").split(","))
        matching = [n for n in names if (n in words if "=" in pattern[:2] else n.startswith(words))]
        if not [n for n in names if (n in matching) != (pattern[0] == "^")]:
            yield wrong("HCCL_SOCKET_IFNAME", f"{pattern} matches no interface", todo)


def _is_own(name: str) -> bool:
    try:
        family, kind, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"
