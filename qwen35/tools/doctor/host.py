"""Memory, disks, port, addresses, interfaces and limits of the host."""

import os
import re
import resource
import shutil
import socket
from pathlib import Path

from qwen35.tools.doctor.machine import GIB, Finding, Machine, gib, note, ok, wrong

MIN_MEMORY = 2 * GIB  # a process that only imports torch takes half of that
OPEN_FILES = 1024  # every tensor on its way from a data loader is an open file


def memory(m: Machine) -> list[Finding]:
    text = (m.files / "proc/meminfo").read_text()
    kibibytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    total, available = (int(kibibytes[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    fact = f"{gib(available)} of {gib(total)} available"
    if available < MIN_MEMORY:
        return [wrong("memory", fact, "end other programs")]
    return [ok("memory", fact)]


def open_files(m: Machine) -> list[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        return [wrong("open files", f"at most {soft} a process", f"ulimit -n {OPEN_FILES * 64}")]
    return [ok("open files", f"{soft:,} a process" if soft >= 0 else "no limit")]


def disk(subject: str, folder: Path, need: int, what: str) -> list[Finding]:
    """Whether `need` bytes (0: unknown) fit on the disk of `folder`, which may not exist yet."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "cannot be written" if existing.is_dir() else "is not a folder"
        return [wrong(subject, f"{existing} {why}", "name another folder, or make it this user's")]
    free = shutil.disk_usage(existing).free
    fact = f"{gib(free)} free for {folder}" + (f"; {what} takes {gib(need)}" if need else "")
    if free < max(need, GIB):
        return [wrong(subject, fact, "free some space, or name a folder on another disk")]
    return [ok(subject, fact)]


def conversions(m: Machine) -> list[Finding]:
    """The disks of `make convert` and `make export`, which write as many bytes as the model has."""
    need = sum(file.stat().st_size for file in Path(m.get("HF") or "nowhere").glob("*.safetensors"))
    folders = {name: m.get(name) for name in ("CONVERT_DCP", "EXPORT_OUT")}
    return [f for name, path in folders.items() if path for f in disk(name, Path(path), need, m.get("HF"))]


def shared_memory(m: Machine, least: int, most: int) -> list[Finding]:
    """Loaders pass batches through /dev/shm: `least` bytes, `most` if full of images."""
    todo = "start the container with a larger --shm-size, or set data.dataloader_param.num_workers=0"
    try:
        stat = os.statvfs(m.files / "dev/shm")
    except OSError as error:
        return [wrong("/dev/shm", str(error.strerror), todo)]
    free = stat.f_bavail * stat.f_frsize
    if free < least:
        return [wrong("/dev/shm", f"{gib(free)} free, the data loaders need {gib(least)}", todo)]
    if free < most:
        return [note("/dev/shm", f"{gib(free)} free, enough unless batches are full of images ({gib(most)})", todo)]
    return [ok("/dev/shm", f"{gib(free)} free, the data loaders need {gib(most)} at most")]


def port(m: Machine) -> list[Finding]:
    number = m.number("MASTER_PORT", 6000)
    if m.number("NODE_RANK", 0) > 0 or (m.number("NODES", 1) == 1 and not m.get("MASTER_PORT")):
        return []  # only node 0 listens, and a single node finds a free port by itself
    try:
        socket.create_server(("", number)).close()
    except OSError as error:
        other = number % 65535 + 1
        return [wrong("port", f"MASTER_PORT={number}: {error.strerror}", f"try MASTER_PORT={other}")]
    return [ok("port", f"MASTER_PORT={number} is free")]


def addresses(m: Machine) -> list[Finding]:
    findings = []
    nodes, master = m.number("NODES", 1), m.get("MASTER_ADDR")
    if nodes > 1 and master:
        address = _resolved(master)
        if address is None:
            todo = "set an address, or a name that every node can resolve (/etc/hosts)"
            findings.append(wrong("MASTER_ADDR", f"{master} cannot be resolved", todo))
        elif m.number("NODE_RANK", 0) == 0 and not _is_own(address):
            fact = f"{master} ({address}) is not an address of this machine, but NODE_RANK is 0"
            findings.append(note("MASTER_ADDR", fact, "correct only if it is forwarded to this machine"))
        else:
            findings.append(ok("MASTER_ADDR", f"{master} ({address})"))
    for name in ("NODE_ADDR", "HCCL_IF_IP") if m.accelerator else ("NODE_ADDR",):
        value = m.get(name)
        if value and not _is_own(_resolved(value) or value):
            findings.append(wrong(name, f"{value} is not an address of this machine", "see: ip address"))
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
    """gloo takes full names, all of which must exist.

    HCCL takes prefixes of names, full names after "=", and excludes those after "^".
    """
    folder = m.files / "sys/class/net"
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    todo = f"there are {', '.join(names)}"
    findings = []
    of_gloo = [name for name in m.get("GLOO_SOCKET_IFNAME").split(",") if name]
    if missing := [name for name in of_gloo if name not in names]:
        findings.append(wrong("GLOO_SOCKET_IFNAME", f"no interface {', '.join(missing)}", todo))
    elif of_gloo:
        findings.append(ok("GLOO_SOCKET_IFNAME", ", ".join(of_gloo)))
    pattern = m.get("HCCL_SOCKET_IFNAME")
    if pattern and m.accelerator:
        words = pattern.lstrip("^=").split(",")
        prefix = pattern[: len(pattern) - len(pattern.lstrip("^="))]
        matching = [n for n in names if (n in words if "=" in prefix else n.startswith(tuple(words)))]
        of_hccl = [n for n in names if (n in matching) != ("^" in prefix)]
        finding = ok("HCCL_SOCKET_IFNAME", ", ".join(of_hccl)) if of_hccl else None
        findings.append(finding or wrong("HCCL_SOCKET_IFNAME", f"{pattern} matches no interface", todo))
    return findings
