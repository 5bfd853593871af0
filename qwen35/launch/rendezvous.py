"""The launchers of all nodes connect, compare what must agree, and stay connected.

This happens before any rank starts. Node 0 listens at MASTER_PORT and the others connect. When all
are there, node 0 asks each for its clock, for its facts (consistency.py) and whether it sees node
0's save folder; it compares the answers, and tells every node to start, or why not. Then it stops
listening, so that the ranks can use the same port. The connections stay open: when one node ends,
the others learn of it at once instead of after a timeout. This module does not import torch, so it
starts quickly.

Anybody may reach the port. A peer that does not prove the secret (handshake.py) learns nothing and
delays nobody. Without a secret everybody passes: then the nodes exchange salted hashes, and node 0
alone says what differs.

Clocks that differ are reported, for readers of logs, file times and checkpoints' dates, but are
never a reason to stop: no computation depends on the clock of another node.
"""

import contextlib
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.errors import USER_ERRORS, one_line
from qwen35.launch.connection import HANDSHAKE_TIMEOUT, Peer, PeerLost
from qwen35.launch.consistency import disagreements, hashed, marker_file, node_names, sees_marker, unhashed
from qwen35.launch.handshake import SECRET, Hello, PendingHandshakes, authenticate
from qwen35.launch.nodes import REPLY_TIMEOUT, Rendezvous, RendezvousError, RendezvousParameters, sanitized
from qwen35.log import logger
from qwen35.network import LOOPBACK

WITHHELD = f"the nodes did not start; node 0 prints the reason, and with {SECRET} set every node does"
UPDATE_INTERVAL, REPEAT_INTERVAL = 5.0, 30.0  # seconds between log lines on missing nodes: if the list is new, if not
MAX_CLOCK_SKEW = 5.0  # seconds that clocks may differ without a note
FILE_TIMEOUT = 10.0  # seconds until a new file must be visible on all nodes: network file systems cache listings


@dataclass(frozen=True)
class LocalNode:
    """What this node contributes to the comparison."""

    facts: Callable[[], Mapping[str, str]]  # what must be the same on all nodes; called once all are connected
    save: Path
    log: Callable[[str], None] = logger.info
    clock: Callable[[], float] = time.time
    file_timeout: float | None = None  # default: FILE_TIMEOUT


def join(params: RendezvousParameters, local: LocalNode) -> Rendezvous:
    """Wait until all nodes are connected and agree; else raise RendezvousError, on all of them."""
    return _host(params, local) if params.node_rank == 0 else _join(params, local)


class WaitingLog:
    """Logs who is missing: at once, and then at intervals."""

    def __init__(self, params: RendezvousParameters, local: LocalNode):
        self.params, self.local = params, local
        self.deadline = time.monotonic() + params.timeout
        self.last: str | None = None
        self.last_time = 0.0

    @property
    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def log(self, missing: str, reason: str = "") -> None:
        now = time.monotonic()
        if self.last is None or now - self.last_time > (REPEAT_INTERVAL if missing == self.last else UPDATE_INTERVAL):
            self.last, self.last_time = missing, now
            detail = reason and f" ({reason})"
            up_to = f"up to {self.remaining:.0f} s more (RENDEZVOUS_TIMEOUT)"
            self.local.log(f"node {self.params.node_rank}: waiting for {missing}{detail}, {up_to}")


# -- node 0 ----------------------------------------------------------------------------------------


def listen(port: int, is_alone: bool = False) -> socket.socket:
    """A socket at all IPv4 and IPv6 addresses, or at loopback for a single node. Raises OSError."""
    if is_alone:
        return socket.create_server((LOOPBACK, port))
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def free_port(is_alone: bool) -> int:
    """A port at which `listen` would succeed. Raises OSError."""
    with listen(0, is_alone) as server:
        return server.getsockname()[1]


def _host(params: RendezvousParameters, local: LocalNode) -> Rendezvous:
    peers: dict[int, Peer] = {}
    try:
        with listen(params.port) as server:
            _connect_all(server, peers, params, local)
        _compare(peers, local, params.secret)
        for node, peer in peers.items():
            with _raising_if_lost(node):
                peer.send(go=True)
    except RendezvousError as error:
        message = str(error) if params.secret else WITHHELD
        for peer in peers.values():
            with contextlib.suppress(PeerLost):
                peer.send(error=message, ended=message)  # `ended` is for those that were already told to start
            peer.close()
        raise
    return Rendezvous(params, peers)


def _connect_all(server: socket.socket, peers: dict[int, Peer], params: RendezvousParameters, local: LocalNode) -> None:
    waiting = WaitingLog(params, local)
    sent, sent_time = "", 0.0
    pending = PendingHandshakes(server, params.secret, lambda line: local.log(f"node 0, port {params.port}: {line}"))
    with contextlib.closing(pending):
        while missing := sorted(set(range(1, params.nnodes)) - peers.keys()):
            names, now = f"{node_names(missing)} of {params.nnodes}", time.monotonic()
            if waiting.remaining <= 0:
                raise RendezvousError(
                    f"{names} did not connect to MASTER_PORT={params.port} of node 0 within {params.timeout:.0f} s: was the run"
                    f" started there, with NODES={params.nnodes}, its own NODE_RANK and the MASTER_ADDR of node 0?"
                )
            waiting.log(names, f"port {params.port}")
            if names != sent or now - sent_time > UPDATE_INTERVAL:
                sent, sent_time = names, now
                for peer in peers.values():
                    with contextlib.suppress(PeerLost):  # handled below
                        peer.send(waiting=names)
            sockets = [*pending.sockets, *(peer.connection for peer in peers.values())]
            timeout = min(now + UPDATE_INTERVAL, waiting.deadline, pending.deadline) - time.monotonic()
            ready = select.select(sockets, [], [], max(0.0, timeout))[0]
            for node, peer in list(peers.items()):
                if peer.connection in ready:  # it sends nothing in this phase, so it has left
                    del peers[node]
                    peer.close()
                    local.log(f"node 0: node {node} ({peer.address}) has left")
            for peer, hello in pending.advance(ready):
                _admit(peer, hello, peers, params)


def _admit(peer: Peer, hello: Hello, peers: dict[int, Peer], params: RendezvousParameters) -> None:
    node = hello.node_rank
    if hello.nnodes != params.nnodes:
        message = f"node {node} ({peer.address}) has NODES={hello.nnodes}, node 0 has NODES={params.nnodes}"
    elif node == 0 or node in peers:
        other = "the one that listens" if node == 0 else peers[node].address
        message = f"two nodes have NODE_RANK={node}: {other} and {peer.address}"
    else:
        peers[node] = peer
        return
    with contextlib.suppress(PeerLost):
        peer.send(error=message if params.secret else WITHHELD)
    peer.close()
    raise RendezvousError(message)


@contextlib.contextmanager
def _raising_if_lost(node: int) -> Iterator[None]:
    try:
        yield
    except PeerLost as error:
        raise RendezvousError(f"node {node} has left before the run started: {error}") from None


def _compare(peers: Mapping[int, Peer], local: LocalNode, secret: str) -> None:
    """Facts and the save folder must agree; clocks are only reported. Raises RendezvousError."""
    salt, asked_at = secrets.token_hex(16), {}
    try:
        with marker_file(local.save) as marker:
            for node, peer in peers.items():
                asked_at[node] = local.clock()
                with _raising_if_lost(node):
                    peer.send(look=marker, salt=salt)
            facts = {0: dict(local.facts())}
            replies = {node: _receive_reply(node, peer) for node, peer in peers.items()}
    except RendezvousError:
        raise
    except USER_ERRORS as error:
        raise RendezvousError(f"node 0: {one_line(error)}") from None
    for node, (clock, node_facts, _) in replies.items():
        ahead = clock - asked_at[node]
        if not abs(ahead) <= MAX_CLOCK_SKEW:  # true for NaN too
            skew = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} node 0's"
            local.log(
                f"note: the clock of node {node} is {skew}; training is unaffected, times in logs and files differ"
            )
        facts[node] = node_facts if secret else unhashed(node_facts, facts[0], salt)
    differences = disagreements(facts)
    for difference in differences:
        local.log(sanitized(difference.line))
    for node, peer in peers.items():
        with _raising_if_lost(node):
            peer.send(lines=[difference.line for difference in differences if secret and node in difference.nodes])
    if differences:
        count = "one thing" if len(differences) == 1 else f"{len(differences)} things"
        raise RendezvousError(f"the nodes differ in {count}, listed above: nothing was started")
    if blind := [node for node, (_, _, has_seen) in replies.items() if not has_seen]:
        verb = "does" if len(blind) == 1 else "do"
        raise RendezvousError(
            f"{node_names(blind)} {verb} not see what node 0 writes in {local.save}: name a training.save on a file system"
            " that all nodes share"
        )


def _receive_reply(node: int, peer: Peer) -> tuple[float, dict[str, str], bool]:
    """A node's clock, its facts, and whether it sees the save folder. Raises RendezvousError."""
    with _raising_if_lost(node):
        reply = peer.receive(REPLY_TIMEOUT)
    name = f"node {node} ({peer.address})"
    if reply is None:
        raise RendezvousError(f"{name} did not answer within {REPLY_TIMEOUT:.0f} s")
    if error := reply.get("error"):
        raise RendezvousError(f"node {node}: {sanitized(error)}")
    clock, facts, has_seen = (reply.get(key) for key in ("time", "facts", "seen"))
    if not (type(clock) is float and isinstance(facts, dict) and type(has_seen) is bool):
        raise RendezvousError(f"{name} sent an invalid answer")
    return clock, {key: str(value) for key, value in facts.items()}, has_seen


# -- the other nodes -------------------------------------------------------------------------------


def _join(params: RendezvousParameters, local: LocalNode) -> Rendezvous:
    peer = _connect(params, local)
    timeout = params.timeout + REPLY_TIMEOUT
    waiting = WaitingLog(params, local)
    try:
        while True:
            message = peer.receive(timeout)
            if message is None:
                raise RendezvousError(f"node 0 sent nothing for {timeout:.0f} s")
            if "error" in message:
                raise RendezvousError(sanitized(message["error"]))
            if "go" in message:
                return Rendezvous(params, {0: peer})
            if "waiting" in message:
                waiting.log(sanitized(message["waiting"]))
            lines = message.get("lines")
            for line in lines if isinstance(lines, list) else ():
                local.log(sanitized(line))
            if "look" in message:
                peer.send(**_reply(message, local, params.secret))
    except PeerLost as error:
        peer.close()
        raise RendezvousError(f"node 0 has left before the run started: {error}") from None
    except RendezvousError:
        peer.close()
        raise


def _reply(message: Mapping[str, Any], local: LocalNode, secret: str) -> dict[str, Any]:
    """The answer to node 0. Raises RendezvousError if it may not learn what failed here."""
    try:
        clock, facts = local.clock(), dict(local.facts())
        timeout = FILE_TIMEOUT if local.file_timeout is None else local.file_timeout
        has_seen = sees_marker(local.save, str(message["look"]), timeout)
    except USER_ERRORS as error:
        if not secret:
            raise RendezvousError(one_line(error)) from None
        return {"error": one_line(error)}
    return {"time": clock, "facts": facts if secret else hashed(facts, str(message.get("salt"))), "seen": has_seen}


def _connect(params: RendezvousParameters, local: LocalNode) -> Peer:
    waiting = WaitingLog(params, local)
    pause = 0.1
    while True:
        reason = f"what answers there is not a launcher of this run, or has another {SECRET}"
        try:
            peer = Peer(
                socket.create_connection((params.address, params.port), timeout=HANDSHAKE_TIMEOUT), params.address
            )
            if authenticate(peer, params):
                return peer
            peer.close()
        except PeerLost:
            peer.close()
        except OSError as error:
            reason = one_line(error)
        name = f"node 0 at {params.address}:{params.port}"
        if waiting.remaining <= 0:
            raise RendezvousError(
                f"{name} did not answer within {params.timeout:.0f} s: {reason}; was the run started there, and do MASTER_ADDR,"
                " MASTER_PORT and the firewall lead to it?"
            )
        waiting.log(name, reason)
        time.sleep(min(pause, max(0.0, waiting.remaining)))
        pause = min(2 * pause, 1.0)
