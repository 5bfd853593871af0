"""The file that HOSTS names: the nodes of a run, one a line, node 0 first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen35.errors import SettingError, read_text

TARGET = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")  # never an option of ssh
ADDRESS = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")
FORM = "a line is [user@]name [slots=8] [addr=10.0.0.1] [port=22]"
PER_NODE_VARIABLES = {  # variable -> what takes its place
    "NODE_RANK": "the order of the lines numbers the nodes",
    "NODE_ADDR": "give it as addr=… in the node's line",
    "HCCL_IF_IP": "give it as addr=… in the node's line",
}


@dataclass(frozen=True)
class Host:
    target: str  # for ssh: [user@]name
    slots: int | None = None  # processes on the node
    address: str | None = None  # on the network of the run; default: the name
    port: int | None = None  # of ssh

    @property
    def name(self) -> str:
        return self.target.rpartition("@")[2]


def read_hosts(path: Path) -> list[Host]:
    """Raises SettingError that names the line."""
    hosts: list[Host] = []
    for number, line in enumerate(read_text(path, SettingError).splitlines(), 1):
        fields = line.partition("#")[0].split()
        if fields:
            host = _parse_line(fields, f"{path}, line {number}")
            if any((host.name, host.port) == (other.name, other.port) for other in hosts):
                raise SettingError(
                    f"{path}, line {number}: {host.name} is listed twice: one line a node, slots=… processes"
                )
            hosts.append(host)
    if not hosts:
        raise SettingError(f"{path}: lists no node; {FORM}")
    counts = {host.slots for host in hosts}
    if len(counts) > 1:
        given = ", ".join(f"{host.name} {host.slots or 'no slots'}" for host in hosts)
        raise SettingError(f"{path}: all nodes must have the same slots: {given}")
    return hosts


def _parse_line(fields: Sequence[str], where: str) -> Host:
    target, *options = fields
    values: dict[str, str] = {}
    if not TARGET.fullmatch(target):
        raise SettingError(f"{where}: {target!r} is not a host name; {FORM}")
    for option in options:
        name, equals, value = option.partition("=")
        if name not in ("slots", "addr", "port") or not equals or name in values:
            raise SettingError(f"{where}: {option!r} is none of slots=…, addr=…, port=…, each once; {FORM}")
        is_number = value.isdecimal() and len(value) < 6 and int(value) > 0
        if not (ADDRESS.fullmatch(value) if name == "addr" else is_number and (name == "slots" or int(value) < 65536)):
            raise SettingError(f"{where}: {option!r} needs {'an address' if name == 'addr' else 'a number'}; {FORM}")
        values[name] = value
    slots, port = (int(values[name]) if name in values else None for name in ("slots", "port"))
    return Host(target, slots, values.get("addr"), port)


def check_environment(hosts: Sequence[Host], environment: Mapping[str, str]) -> None:
    """Environment variables must not contradict the file. Raises SettingError."""
    for name, instead in PER_NODE_VARIABLES.items():
        if environment.get(name):
            raise SettingError(f"{name}={environment[name]} belongs to one node, and HOSTS starts all: {instead}")
    nodes = environment.get("NODES") or "1"
    if nodes not in ("1", str(len(hosts))):  # 1 is the default
        raise SettingError(f"NODES={nodes}, but HOSTS lists {len(hosts)} nodes: leave NODES out")
    count = environment.get("NPUS_PER_NODE")
    if count and hosts[0].slots and count != str(hosts[0].slots):
        raise SettingError(f"NPUS_PER_NODE={count}, but HOSTS says slots={hosts[0].slots}: leave one of them out")
    master, first = environment.get("MASTER_ADDR"), hosts[0]
    if master and first.address and master != first.address:
        raise SettingError(f"MASTER_ADDR={master}, but HOSTS gives node 0 addr={first.address}: leave one of them out")
    if len(hosts) > 1 and not master and not first.address and first.name == "localhost":
        raise SettingError(
            "HOSTS: the other nodes cannot reach node 0 as localhost: give the name that they know it by"
        )
