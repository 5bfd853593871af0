"""The machine that is checked, and a finding about it."""

import os
import platform
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal

Status = Literal["ok", "wrong", "note"]
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    status: Status
    subject: str
    fact: str
    todo: str = ""  # what the user can do about it


def ok(subject: str, fact: str) -> Finding:
    return Finding("ok", subject, fact)


def note(subject: str, fact: str, todo: str = "") -> Finding:
    return Finding("note", subject, fact, todo)


def wrong(subject: str, fact: str, todo: str) -> Finding:
    return Finding("wrong", subject, fact, todo)


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


def release(version: str) -> tuple[int, ...]:
    """ "2.7.1.post11" -> (2, 7, 1); "8.5.0.alpha003" -> (8, 5, 0); "x" -> ()."""
    numbers = []
    for word in version.partition("+")[0].partition("-")[0].split("."):
        if not word.isdecimal():
            break
        numbers.append(int(word))
    return tuple(numbers)


def first_match(file: Path, pattern: str) -> str | None:
    """The pattern's first group in a text file, ^ at any line; None without file or match."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else None


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"


def architecture() -> str:
    return platform.machine()
