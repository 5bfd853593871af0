"""Memory, disk, ports, addresses and limits of the host."""

import os
import re
import resource
import shutil
import socket
from pathlib import Path

from qwen35.tools.doctor.machine import GIB, Finding, Machine, gib, note, ok, wrong

LEAST_MEMORY = 2 * GIB  # a process of torch alone takes half of that
OPEN_FILES = 1024  # every tensor between a loader and its run is an open file


def memory(m: Machine) -> list[Finding]:
    text = (m.files / "proc/meminfo").read_text()
    kibibytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    total, available = (int(kibibytes[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    fact = f"{gib(available)} of {gib(total)} available"
    if available < LEAST_MEMORY:
        return [wrong("memory", fact, "end other programs")]
    return [ok("memory", fact)]


def open_files(m: Machine) -> list[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        return [wrong("open files", f"at most {soft} a process", f"ulimit -n {OPEN_FILES * 64}")]
    return [ok("open files", f"{soft:,} a process" if soft >= 0 else "no limit")]


def disk(subject: str, folder: Path, need: int, what: str) -> list[Finding]:
    """`need` bytes (0: not known) where `folder` is, or will be made."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is no folder"
        return [wrong(subject, f"{there} {why}", "name another folder, or make it this user's")]
    free = shutil.disk_usage(there).free
    fact = f"{gib(free)} free for {folder}" + (f"; {what} takes {gib(need)}" if need else "")
    if free < max(need, GIB):
        return [wrong(subject, fact, "make room, or name a folder on another disk")]
    return [ok(subject, fact)]


def conversions(m: Machine) -> list[Finding]:
    """`make convert` and `make export` write as many bytes as the model folder has."""
    need = sum(file.stat().st_size for file in Path(m.get("HF") or "nowhere").glob("*.safetensors"))
    folders = {name: m.get(name) for name in ("CONVERT_DCP", "EXPORT_OUT")}
    return [f for name, path in folders.items() if path for f in disk(name, Path(path), need, m.get("HF"))]


def shared_memory(m: Machine, least: int, most: int) -> list[Finding]:
    """Loaders hand their batches over through /dev/shm: `least` bytes without images, `most` with nothing but."""
    todo = "start the container with a larger --shm-size, or set data.dataloader_param.num_workers=0"
    try:
        stat = os.statvfs(m.files / "dev/shm")
    except OSError as error:
        return [wrong("/dev/shm", str(error.strerror), todo)]
    free = stat.f_bavail * stat.f_frsize
    if free < least:
        return [wrong("/dev/shm", f"{gib(free)} free, the loaders need {gib(least)}", todo)]
    if free < most:
        return [note("/dev/shm", f"{gib(free)} free, enough unless batches are full of images ({gib(most)})", todo)]
    return [ok("/dev/shm", f"{gib(free)} free, the loaders need {gib(most)} at most")]


def port(m: Machine) -> list[Finding]:
    number = m.number("MASTER_PORT", 6000)
    if m.number("NODE_RANK", 0) > 0:
        return []  # it is machine 0 that listens
    try:
        socket.create_server(("", number)).close()
    except OSError as error:
        other = number % 65535 + 1
        return [wrong("port", f"MASTER_PORT={number}: {error.strerror}", f"another: MASTER_PORT={other}")]
    return [ok("port", f"MASTER_PORT={number} is free")]


def addresses(m: Machine) -> list[Finding]:
    findings = []
    nodes, master = m.number("NODES", 1), m.get("MASTER_ADDR")
    if nodes > 1 and master:
        address = _resolved(master)
        if address is None:
            todo = "an address, or a name that every machine knows (/etc/hosts)"
            findings.append(wrong("MASTER_ADDR", f"{master} cannot be resolved", todo))
        elif m.number("NODE_RANK", 0) == 0 and not _is_own(address):
            fact = f"{master} ({address}) is no address of this machine, and NODE_RANK is 0"
            findings.append(note("MASTER_ADDR", fact, "right only if it leads here by another way"))
        else:
            findings.append(ok("MASTER_ADDR", f"{master} ({address})"))
    for name in ("NODE_ADDR", "HCCL_IF_IP") if m.accelerator else ("NODE_ADDR",):
        value = m.get(name)
        if value and not _is_own(_resolved(value) or value):
            findings.append(wrong(name, f"{value} is no address of this machine", "see: ip address"))
    return findings


def _resolved(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return None


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def interfaces(m: Machine) -> list[Finding]:
    """gloo takes whole names, and needs each; HCCL takes the start of a name, "=" before whole ones, "^" before all but."""
    folder = m.files / "sys/class/net"
    if not folder.is_dir():
        return []
    there = sorted(path.name for path in folder.iterdir())
    todo = f"there are {', '.join(there)}"
    findings = []
    whole = [word for word in m.get("GLOO_SOCKET_IFNAME").split(",") if word]
    if missing := [word for word in whole if word not in there]:
        findings.append(wrong("GLOO_SOCKET_IFNAME", f"no interface {', '.join(missing)}", todo))
    elif whole:
        findings.append(ok("GLOO_SOCKET_IFNAME", ", ".join(whole)))
    pattern = m.get("HCCL_SOCKET_IFNAME")
    if pattern and m.accelerator:
        words = pattern.lstrip("^=").split(",")
        prefix = pattern[: len(pattern) - len(pattern.lstrip("^="))]
        named = [n for n in there if (n in words if "=" in prefix else n.startswith(tuple(words)))]
        left = [n for n in there if (n in named) != ("^" in prefix)]
        finding = ok("HCCL_SOCKET_IFNAME", ", ".join(left)) if left else None
        findings.append(finding or wrong("HCCL_SOCKET_IFNAME", f"{pattern} names no interface", todo))
    return findings
