"""Start a run on all nodes of a file over ssh: `python -m qwen35.launch.hosts`.

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
import secrets
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from qwen35.config.load import load_settings
from qwen35.console import outlive_readers
from qwen35.errors import USER_ERRORS, Parser, SettingError, complain, visible
from qwen35.launch.handshake import SECRET, check_secret
from qwen35.launch.hosts_file import Host, check_environment, read_hosts
from qwen35.launch.job import DUPLICATE_SIGNAL
from qwen35.log import log_at_once
from qwen35.processes import die_with, stop_signals

# ask no questions, accept no unknown host keys, notice a lost node within a minute
OPTIONS = (
    "BatchMode=yes StrictHostKeyChecking=yes ConnectTimeout=15 ServerAliveInterval=15 ServerAliveCountMax=4".split()
)
NOT_CONNECTED = 255  # ssh's own exit code
SHUTDOWN_GRACE = 10.0  # seconds that the other nodes have to end by themselves after one has failed
SAVE_GRACE = 120.0  # the same after a connection was lost: the node behind it may still be saving
NOT_SENT = {"HOSTS", "HOSTS_DIR", "SSH", "DRY_RUN", "ARGS", "PYTHON", SECRET}  # passed otherwise, or local
SENT_PREFIXES = ("HCCL_", "GLOO_")  # of variables that are sent although env.sh does not name them


def node_environment(
    hosts: Sequence[Host], number: int, variables: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables that are set on one of the nodes."""
    host, first = hosts[number], hosts[0]
    names = [*variables, *(name for name in environment if name.startswith(SENT_PREFIXES))]
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
        self.stop_signal: int | None = None  # that asked for the end
        self.stop_time = 0.0
        self.failed: RemoteNode | None = None  # the first one
        for number in stop_signals():
            signal.signal(number, self.request_stop)

    def request_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal is None:
            self.stop_signal, self.stop_time = number, time.monotonic()
            self.send(b"stop\n")  # before anything that may fail
            log_at_once("stopping: the run saves at the next log step, on all nodes (Ctrl-C again: at once)")
        elif number == signal.SIGINT and time.monotonic() - self.stop_time > DUPLICATE_SIGNAL:
            self.send(b"kill\n")

    def send(self, command: bytes) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                node.send(command)

    def wait(self) -> int:
        """Returns the exit code: that of the first node that failed."""
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
                self.failed = next((node for node in self.nodes if node.process.poll()), None)
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
            if node.process.wait() and self.failed is None:
                self.failed = node
        return self.report()

    def report(self) -> int:
        """Print which node failed. Returns the exit code."""
        if self.stop_signal == signal.SIGINT:
            return 128 + signal.SIGINT
        if self.failed is None:
            return 0
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
    parser.add_argument("config", help="a recipe, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    args = parser.parse_args(argv)
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
