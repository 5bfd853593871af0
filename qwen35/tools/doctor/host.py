"""The machine that is checked, and its installation. Only the standard library is imported."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal, NamedTuple

from qwen35.tools.stack import TESTED, is_tested, of_torch_npu

PROBE = "import json, torch, qwen35.train, qwen35.device as d; print(json.dumps([torch.__version__, d.device_count()]))"
SECONDS = {"import": 120, "npu-smi": 30}  # that a program may take to answer
INSTALL = "make install"


class Finding(NamedTuple):
    status: Literal["ok", "wrong", "note"]
    subject: str
    fact: str
    todo: str = ""  # what the user can do about it


ok, note, wrong = (partial(Finding, status) for status in ("ok", "note", "wrong"))


@dataclass(frozen=True)
class Machine:
    """This machine, or one that a test describes."""

    accelerator: str | None = None  # torch's device type of this installation; None: the host
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)  # as scripts/doctor.sh exported it
    root: Path = field(default_factory=Path.cwd)  # the project's folder
    files: Path = Path("/")  # the root of dev, etc and usr/local/Ascend
    site: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path))  # where packages are installed
    python: str = sys.executable
    python_version: tuple[int, ...] = tuple(sys.version_info[:3])
    include: str = sysconfig.get_path("include", "posix_prefix")  # of Python.h, as triton-ascend finds it

    def get(self, name: str) -> str:
        return self.environment.get(name, "")

    def number(self, name: str, default: int) -> int:
        """A variable of env.sh as a number; the default if it is none, which env.sh reports."""
        return int(self.get(name)) if self.get(name).isdecimal() else default

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

    def ask(self, name: str, *command: str) -> tuple[str, str]:
        """What a program prints, and in one line why it failed; "" if it has not."""
        try:
            done = subprocess.run(
                command, cwd=self.root, env=dict(self.environment), capture_output=True, text=True, errors="replace",
                timeout=SECONDS[name], check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "", f"no answer in {SECONDS[name]} s"
        words = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        return done.stdout, words.splitlines()[-1] if done.returncode else ""


def installation(m: Machine) -> Iterator[Finding]:
    """Whether .venv has what the lock file pins and can import it: to the first that ends all."""
    version = f"{'.'.join(map(str, m.python_version))}, {m.python}"
    if not (3, 10) <= m.python_version[:2] <= (3, 12):
        yield wrong("Python", f"{version}: not 3.10 to 3.12", "choose another: PYTHON=… make install")
        return
    yield ok("Python", version)
    stamp = m.root / ".venv/.installed"
    device, arch, torch_npu, *_ = [*(stamp.read_text() if stamp.is_file() else "").split("-"), "", ""]
    locks = [m.root / f"scripts/requirements/{name}.txt" for name in (f"{device}-{arch}", device)]
    lock, stack = next((file for file in locks if file.is_file()), None), of_torch_npu(torch_npu)
    pinned = lock.read_text() if lock else ""
    if lock is None or ("torch-npu==" in pinned and stack is None):
        half = "incomplete" if stamp.parent.is_dir() else "there is none yet"
        yield wrong("installation", f"{stamp} names no lock file" if device else half, INSTALL)
        return
    pins = re.findall(r"^([\w.-]+)==([^ +\n]+)\S*( ;)?", stack.pins(pinned) if stack else pinned, re.MULTILINE)
    found = {name: package.version for name, *_ in pins if (package := m.package(name))}
    missing = [name for name, _, has_marker in pins if not has_marker and name not in found]
    ours = m.package("qwen35")
    if missing or not ours:
        yield wrong("installation", f"{', '.join(missing or ['qwen35'])} of {lock.name} missing", INSTALL)
        return
    for name, (oldest, newest) in TESTED.items():
        if not is_tested(name, version := found.get(name, "not installed")):
            yield wrong(name, f"{version}: the code is for {oldest} to {newest}", INSTALL)
    either = {(name, version) for name, version, _ in pins}  # a marker chooses between two of a name
    if others := [f"{name} {v}" for name, v in found.items() if (name, v.partition("+")[0]) not in either]:
        fact = f"other versions than {lock.name} pins, which the tests have run on: {', '.join(others)}"
        yield note("installation", fact, "make install restores the pinned versions")
    else:
        yield ok("installation", f"all {len(found)} packages have the versions in {lock.name}")
    url = json.loads(ours.read_text("direct_url.json") or "{}").get("url", "elsewhere")
    if url != m.root.resolve().as_uri():
        yield note("qwen35", f"mm-convert is the one in {url}", "make install installs this folder's")
    yield imports(m)


def imports(m: Machine) -> Finding:
    """Import what a run imports in a subprocess, since an incompatible library may crash it."""
    printed, failure = m.ask("import", m.python, "-c", PROBE)
    todo = "see the lines about CANN, driver and torch-npu" if m.accelerator else INSTALL
    if failure:
        return wrong("import torch", failure, todo)
    (version, devices), visible = json.loads(printed.splitlines()[-1]), len(m.visible())
    if m.accelerator and not 0 < devices == visible:
        return wrong("import torch", f"sees {devices} of {visible} NPUs", todo)
    return ok("import torch", version + (f", sees {devices} NPUs" if m.accelerator else ""))
