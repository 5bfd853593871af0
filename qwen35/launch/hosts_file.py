"""The file of HOSTS: the machines of a run, one a line, machine 0 first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen35.errors import SettingError, read_text

TARGET = re.compile(
    r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:%-]*"
)  # none that ssh takes for an option
ADDRESS = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")
FORM = "a line is [user@]name [slots=8] [addr=10.0.0.1] [port=22]"
OF_ONE_MACHINE = {  # variable -> what says it instead
    "NODE_RANK": "the order of the lines gives each machine its own",
    "NODE_ADDR": "addr=… in a machine's line is its own",
    "HCCL_IF_IP": "addr=… in a machine's line is its own",
}


@dataclass(frozen=True)
class Host:
    target: str  # for ssh: [user@]name
    slots: int | None = None  # processes there
    address: str | None = None  # on the network of the run; default: its name
    port: int | None = None  # of ssh

    @property
    def name(self) -> str:
        return self.target.rpartition("@")[2]


def read_hosts(path: Path) -> list[Host]:
    """Raises SettingError that names the line."""
    hosts: list[Host] = []
    for number, line in enumerate(read_text(path, SettingError).splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            host = _host(words, f"{path}, line {number}")
            if any((host.name, host.port) == (other.name, other.port) for other in hosts):
                raise SettingError(
                    f"{path}, line {number}: {host.name} is there twice: one line a machine, slots=… processes"
                )
            hosts.append(host)
    if not hosts:
        raise SettingError(f"{path}: names no machine; {FORM}")
    counts = {host.slots for host in hosts}
    if len(counts) > 1:
        told = ", ".join(f"{host.name} {host.slots or 'no slots'}" for host in hosts)
        raise SettingError(f"{path}: every machine needs the same slots: {told}")
    return hosts


def _host(words: Sequence[str], where: str) -> Host:
    target, *options = words
    values: dict[str, str] = {}
    if not TARGET.fullmatch(target):
        raise SettingError(f"{where}: {target!r} is no name of a machine; {FORM}")
    for word in options:
        name, equals, value = word.partition("=")
        if name not in ("slots", "addr", "port") or not equals or name in values:
            raise SettingError(f"{where}: {word!r} is none of slots=…, addr=…, port=…, each once; {FORM}")
        is_number = value.isdecimal() and len(value) < 6 and int(value) > 0
        if not (ADDRESS.fullmatch(value) if name == "addr" else is_number and (name == "slots" or int(value) < 65536)):
            raise SettingError(
                f"{where}: {word!r}: {'an address' if name == 'addr' else 'a number'} is expected; {FORM}"
            )
        values[name] = value
    slots, port = (int(values[name]) if name in values else None for name in ("slots", "port"))
    return Host(target, slots, values.get("addr"), port)


def check_environment(hosts: Sequence[Host], environment: Mapping[str, str]) -> None:
    """What is set besides must not contradict the file. Raises SettingError."""
    for name, instead in OF_ONE_MACHINE.items():
        if environment.get(name):
            raise SettingError(f"{name}={environment[name]} is one machine's, and HOSTS starts all: {instead}")
    nodes = environment.get("NODES") or "1"
    if nodes not in ("1", str(len(hosts))):  # 1 is the default
        raise SettingError(f"NODES={nodes}, but HOSTS names {len(hosts)} machines: leave NODES out")
    count = environment.get("NPUS_PER_NODE")
    if count and hosts[0].slots and count != str(hosts[0].slots):
        raise SettingError(f"NPUS_PER_NODE={count}, but HOSTS says slots={hosts[0].slots}: leave one of them out")
    master, first = environment.get("MASTER_ADDR"), hosts[0]
    if master and first.address and master != first.address:
        raise SettingError(
            f"MASTER_ADDR={master}, but HOSTS gives machine 0 addr={first.address}: leave one of them out"
        )
    if len(hosts) > 1 and not master and not first.address and first.name == "localhost":
        raise SettingError(
            "HOSTS: the other machines cannot find machine 0 by the name localhost: name it as they know it"
        )
