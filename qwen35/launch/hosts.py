"""Start a run on all machines of a file, over ssh: `HOSTS=file make finetune`, which calls `python -m qwen35.launch.hosts`.

Each machine runs scripts/node.sh, with the settings of this one and a secret of the run: they go through ssh's standard
input, not its command line, which everybody on a machine can read. Every line that a machine prints comes out here with its
name before it. They end together: what ends one ends all, SIGTERM, SIGHUP and Ctrl-C have the run save and stop, and a second
Ctrl-C stops it at once.

When this process is gone, kill -9 included, so are its ssh processes, and each machine that still hears of its connection's end
has its run save and stop. A machine that is cut off otherwise notices it by what fails in the run itself.
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
from qwen35.console import outlive_readers, say_at_once
from qwen35.errors import USER_ERRORS, Parser, SettingError, complain, visible
from qwen35.launch.handshake import SECRET, check_secret
from qwen35.launch.hosts_file import Host, check_environment, read_hosts
from qwen35.launch.job import AGAIN
from qwen35.processes import die_with, stop_signals

# no question is asked that nobody could answer, no key of an unknown machine is taken, a lost machine is missed in a minute
OPTIONS = [
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "ConnectTimeout=15",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
]
NOT_CONNECTED = 255  # ssh's own exit code
GRACE = 10.0  # seconds that the other machines have to end by themselves, as their launchers do where one fails
SAVING = 120.0  # the same where a connection was lost: the machine behind it saves and stops, if it is still there
NOT_SENT = {"HOSTS", "HOSTS_DIR", "SSH", "DRY_RUN", "ARGS", "PYTHON", SECRET}  # said otherwise, or this machine's own
SENT = ("HCCL_", "GLOO_")  # those that env.sh does not name are sent too


def node_environment(
    hosts: Sequence[Host], number: int, variables: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """What is set for one of the machines."""
    own, first = hosts[number], hosts[0]
    names = [*variables, *(name for name in environment if name.startswith(SENT))]
    values = {name: environment[name] for name in names if name in environment and name not in NOT_SENT}
    values |= {
        "NODES": str(len(hosts)),
        "NODE_RANK": str(number),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first.address or first.name,
    }
    if own.address:
        values["NODE_ADDR"] = own.address
    if own.slots:
        values["NPUS_PER_NODE"] = str(own.slots)
    return values


def ssh_command(ssh: Sequence[str], host: Host, folder: str) -> list[str]:
    options = [word for option in OPTIONS for word in ("-o", option)]
    port = ["-p", str(host.port)] if host.port else []
    return [*ssh, "-T", *options, *port, host.target, f"cd {shlex.quote(folder)} && exec bash scripts/node.sh"]


class Node:
    """A machine of the run: the ssh process that holds it, and what of its lines has come."""

    def __init__(self, host: Host, command: Sequence[str], message: bytes):
        self.host = host
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a terminal's Ctrl-C reaches it through this process alone
            preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # there is one thread here
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.orders = self.process.stdin
        self.outputs: dict[BinaryIO, bytes] = {self.process.stdout: b"", self.process.stderr: b""}  # type: ignore[dict-item]
        self.order(message)

    def order(self, words: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, which its exit code tells
            self.orders.write(words)

    def read(self, stream: BinaryIO) -> bool:
        """Print the lines that have come, with the machine's name. False at the end."""
        more = os.read(stream.fileno(), 1 << 16)
        *lines, self.outputs[stream] = (self.outputs[stream] + more).split(b"\n")
        if not more and self.outputs[stream]:
            lines.append(self.outputs[stream])
        out = sys.stderr if stream is self.process.stderr else sys.stdout
        for line in lines:
            words = visible(line.decode(errors="replace").rstrip().expandtabs())
            print(f"{self.host.name}: {words}", file=out, flush=True)
        return bool(more)


class Machines:
    """All of them, until the last has ended."""

    def __init__(self, nodes: Sequence[Node]):
        self.nodes = nodes
        self.asked: int | None = None  # the signal that asked for the end
        self.asked_at = 0.0
        self.failed: Node | None = None  # the first that did not end well
        for number in stop_signals():
            signal.signal(number, self.ask)

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self.asked_at = number, time.monotonic()
            self.order(b"stop\n")  # before anything that may fail
            say_at_once("stopping: the run saves at the next log step, on all machines (Ctrl-C again: at once)")
        elif number == signal.SIGINT and time.monotonic() - self.asked_at > AGAIN:
            self.order(b"kill\n")

    def order(self, words: bytes) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                node.order(words)

    def wait(self) -> int:
        """Returns the exit code: that of the first machine that failed."""
        selector = selectors.DefaultSelector()
        for node in self.nodes:
            for stream in node.outputs:
                selector.register(stream, selectors.EVENT_READ, node)
        deadline, kills = 0.0, 0
        while selector.get_map():
            for key, _ in selector.select(0.1):
                if not key.data.read(key.fileobj):
                    selector.unregister(key.fileobj)
            if self.failed is None:
                self.failed = next((node for node in self.nodes if node.process.poll()), None)
                if self.failed and self.failed.process.returncode == NOT_CONNECTED:
                    self.order(b"stop\n")
                    deadline = time.monotonic() + SAVING
                else:
                    deadline = time.monotonic() + GRACE
            elif time.monotonic() > deadline:
                if kills:  # they do not even hear of it
                    break
                self.order(b"kill\n")
                deadline, kills = time.monotonic() + GRACE, 1
        for node in self.nodes if kills else ():
            node.process.kill()
        for node in self.nodes:
            if node.process.wait() and self.failed is None:
                self.failed = node
        return self.told()

    def told(self) -> int:
        """Say who failed. Returns the exit code."""
        if self.asked == signal.SIGINT:
            return 128 + signal.SIGINT
        if self.failed is None:
            return 0
        name, code = self.failed.host.name, self.failed.process.returncode
        words = f"ended with exit code {code}"
        if code == NOT_CONNECTED:
            words = (
                f"cannot be reached, or was lost; this must work without a question: ssh {self.failed.host.target} true"
            )
        print(f"error: {name} {words}", file=sys.stderr, flush=True)
        return code if 0 < code < NOT_CONNECTED else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="qwen35.launch.hosts", description=__doc__)
    parser.add_argument(
        "--variables", default="", help="names of the variables that each machine is given, if they are set"
    )
    parser.add_argument("--preflight", action="store_true", help="compare the machines, and train nothing")
    parser.add_argument("hosts", help="a machine a line: [user@]name [slots=8] [addr=10.0.0.1] [port=22]")
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
            words = [f"{name}={value}" for name, value in values.items()]
            if os.environ.get("DRY_RUN") == "1":
                print(shlex.join(command), "<<<", shlex.join([*words, *arguments]))
            else:
                words = [f"{SECRET}={secret}", *words, "", *arguments, ""]
                nodes.append(Node(host, command, b"".join(word.encode() + b"\0" for word in words)))
        return Machines(nodes).wait()
    except USER_ERRORS as error:
        return complain(error)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
