"""Start a run on all nodes of a file over ssh: `python -m qwen35.launch.hosts`.

The file, which HOSTS names, has one node a line, node 0 first.

`HOSTS=file make finetune` calls it. Each node runs scripts/node.sh with this machine's settings
and a secret of the run. They go through ssh's standard input, not its command line, which every
user of a machine can read. Each line that a node prints appears here after the node's name. The
nodes end together: when one fails, all end; SIGTERM, SIGHUP and Ctrl-C make the run save and stop;
a second Ctrl-C stops it at once.

When this process ends, even by kill -9, its ssh processes end too, and each node that still sees
its connection close saves and stops. A node that is cut off notices when its ranks fail.
"""

import contextlib
import os
import re
import secrets
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from qwen35.config.load import load_settings, parse_words
from qwen35.console import outlive_readers
from qwen35.errors import USER_ERRORS, Parser, SettingError, complain, read_text, visible
from qwen35.launch.connection import SECRET, check_secret
from qwen35.launch.job import Stop
from qwen35.processes import STOPPED, die_with, stop_code

# ask no questions, accept no unknown host keys, notice a lost node within a minute
OPTIONS = (
    "BatchMode=yes StrictHostKeyChecking=yes ConnectTimeout=15 ServerAliveInterval=15 ServerAliveCountMax=4".split()
)
NOT_CONNECTED = 255  # ssh's own exit code
FINE = (None, 0, *STOPPED)  # a node that runs, has finished, or has stopped, as all nodes then do
SHUTDOWN_GRACE = 10.0  # seconds that the other nodes have to end by themselves after one has failed
SAVE_GRACE = 120.0  # the same after a connection was lost: the node behind it may still be saving
NOT_SENT = {"HOSTS", "HOSTS_DIR", "SSH", "DRY_RUN", "ARGS", "PYTHON", SECRET}  # passed otherwise, or local
SENT_PREFIXES = ("HCCL_", "GLOO_")  # of variables that are sent although env.sh does not name them
OF_TRACKERS = ("WANDB_", "SWANLAB_", "MLFLOW_")  # the same for node 0, whose first rank alone reports
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


def node_environment(
    hosts: Sequence[Host], number: int, variables: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables that are set on one of the nodes."""
    host, first = hosts[number], hosts[0]
    prefixes = (*SENT_PREFIXES, *OF_TRACKERS) if number == 0 else SENT_PREFIXES
    names = [*variables, *(name for name in environment if name.startswith(prefixes))]
    values = {name: environment[name] for name in names if name in environment and name not in NOT_SENT}
    values |= {
        "NODES": str(len(hosts)),
        "NODE_RANK": str(number),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first.address or first.name,
    }
    if host.address:
        values["NODE_ADDR"] = host.address
    if host.slots:
        values["NPUS_PER_NODE"] = str(host.slots)
    return values


def ssh_command(ssh: Sequence[str], host: Host, folder: str) -> list[str]:
    options = [argument for option in OPTIONS for argument in ("-o", option)]
    port = ["-p", str(host.port)] if host.port else []
    return [*ssh, "-T", *options, *port, host.target, f"cd {shlex.quote(folder)} && exec bash scripts/node.sh"]


class RemoteNode:
    """A node of the run: the ssh process that runs its launcher, and unfinished output."""

    def __init__(self, host: Host, command: Sequence[str], message: bytes):
        self.host = host
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in the terminal reaches it through this process alone
            preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # this process has one thread
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.commands = self.process.stdin
        self.outputs: dict[BinaryIO, bytes] = {self.process.stdout: b"", self.process.stderr: b""}  # type: ignore[dict-item]
        self.send(message)

    def send(self, command: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, as its exit code will show
            self.commands.write(command)

    def read(self, stream: BinaryIO) -> bool:
        """Print the lines that have arrived, each after the node's name. False at the end."""
        data = os.read(stream.fileno(), 1 << 16)
        *lines, self.outputs[stream] = (self.outputs[stream] + data).split(b"\n")
        if not data and self.outputs[stream]:
            lines.append(self.outputs[stream])
        out = sys.stderr if stream is self.process.stderr else sys.stdout
        for line in lines:
            text = visible(line.decode(errors="replace").rstrip().expandtabs())
            print(f"{self.host.name}: {text}", file=out, flush=True)
        return bool(data)


class RemoteNodes:
    """All nodes of the run, until the last has ended."""

    def __init__(self, nodes: Sequence[RemoteNode]):
        self.nodes = nodes
        self.stop = Stop(partial(self.send, b"stop\n"), partial(self.send, b"kill\n"), ", on all nodes")
        self.failed: RemoteNode | None = None  # the first one

    def send(self, command: bytes) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                node.send(command)

    def wait(self) -> int:
        """Returns the exit code: of the first node that failed, else of a stopped run, else 0."""
        selector = selectors.DefaultSelector()
        for node in self.nodes:
            for stream in node.outputs:
                selector.register(stream, selectors.EVENT_READ, node)
        deadline, was_killed = 0.0, False
        while selector.get_map():
            for key, _ in selector.select(0.1):
                if not key.data.read(key.fileobj):
                    selector.unregister(key.fileobj)
            if self.failed is None:
                self.failed = next((node for node in self.nodes if node.process.poll() not in FINE), None)
                if self.failed and self.failed.process.returncode == NOT_CONNECTED:
                    self.send(b"stop\n")
                    deadline = time.monotonic() + SAVE_GRACE
                else:
                    deadline = time.monotonic() + SHUTDOWN_GRACE
            elif time.monotonic() > deadline:
                if was_killed:  # the command did not reach them
                    break
                self.send(b"kill\n")
                deadline, was_killed = time.monotonic() + SHUTDOWN_GRACE, True
        for node in self.nodes if was_killed else ():
            node.process.kill()
        for node in self.nodes:
            if node.process.wait() not in FINE and self.failed is None:
                self.failed = node
        return self.report()

    def report(self) -> int:
        """Print which node failed. Returns the exit code."""
        has_stopped = any(node.process.returncode in STOPPED for node in self.nodes)
        if self.failed is None or self.stop.number == signal.SIGINT:
            return stop_code(self.stop.number) if self.failed or has_stopped else 0
        name, code = self.failed.host.name, self.failed.process.returncode
        reason = f"ended with exit code {code}"
        if code == NOT_CONNECTED:
            target = self.failed.host.target
            reason = f"cannot be reached, or lost its connection; this must work without a prompt: ssh {target} true"
        print(f"error: {name} {reason}", file=sys.stderr, flush=True)
        return code if 0 < code < NOT_CONNECTED else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="qwen35.launch.hosts", description=__doc__)
    parser.add_argument("--variables", default="", help="names of variables that each node gets, if they are set")
    parser.add_argument(
        "--preflight", action="store_true", help="compare the nodes, measure an all-reduce, and train nothing"
    )
    parser.add_argument("hosts", help="a file with a node a line: [user@]name [slots=8] [addr=10.0.0.1] [port=22]")
    args = parse_words(parser, argv)
    try:
        hosts = read_hosts(Path(args.hosts))
        check_environment(hosts, os.environ)
        load_settings(args.config, args.overrides)
        try:
            ssh = shlex.split(os.environ.get("SSH") or "ssh")
        except ValueError as error:
            raise SettingError(f"SSH={os.environ['SSH']}: {error}") from None
        folder = os.environ.get("HOSTS_DIR") or str(Path.cwd())
        arguments = [*(["--preflight"] if args.preflight else []), *args.overrides]
        secret = check_secret(os.environ.get(SECRET, "")) or secrets.token_hex(32)
        nodes = []
        for number, host in enumerate(hosts):
            command = ssh_command(ssh, host, folder)
            values = node_environment(hosts, number, args.variables.split(), os.environ)
            assignments = [f"{name}={value}" for name, value in values.items()]
            if os.environ.get("DRY_RUN") == "1":
                print(shlex.join(command), "<<<", shlex.join([*assignments, *arguments]))
            else:
                message = [f"{SECRET}={secret}", *assignments, "", *arguments, ""]
                nodes.append(RemoteNode(host, command, b"".join(field.encode() + b"\0" for field in message)))
        return RemoteNodes(nodes).wait()
    except USER_ERRORS as error:
        return complain(error)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
