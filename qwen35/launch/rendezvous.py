"""The launchers of all nodes connect before any rank starts, and stay connected.

Node 0 listens at MASTER_PORT and the others connect. When all are there it tells every node to
start, and stops listening, so that the ranks can use the same port. The connections stay open: when
one node ends, the others learn of it at once instead of after a timeout, and ranks that failed
restart together. Settings, data and weights are compared later, by the ranks
(tools/consistency.py); here only what they need to meet at all. This module does not import torch,
so it starts quickly.

Anybody may reach the port. A peer that does not prove the secret (connection.py) learns nothing and
delays nobody. Without a secret everybody passes.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qwen35.errors import UserError, one_line, visible
from qwen35.launch.connection import (
    HANDSHAKE_TIMEOUT,
    SECRET,
    Hello,
    Peer,
    PeerLost,
    PendingHandshakes,
    authenticate,
)
from qwen35.log import logger
from qwen35.tools.address import listen
from qwen35.wording import named

WITHHELD = f"the nodes did not start; node 0 prints the reason, and with {SECRET} set every node does"
UPDATE_INTERVAL, REPEAT_INTERVAL = 5.0, 30.0  # seconds between log lines on missing nodes: if the list is new, if not
REPLY_TIMEOUT = 120.0  # seconds that a node has to answer
LAUNCHER_GONE = "its launcher is gone (killed, or the machine is down)"


class RendezvousError(UserError):
    """The nodes did not find each other."""


@dataclass(frozen=True)
class RendezvousParameters:
    """Which node this is, and where the nodes meet."""

    node_rank: int
    nnodes: int
    address: str  # of node 0
    port: int
    timeout: float  # seconds to wait for the last node
    must_agree: str  # see Hello
    secret: str = field(default="", repr=False)  # shared by the launchers of the run alone


def join(params: RendezvousParameters) -> "Rendezvous":
    """Wait until all nodes are connected; else raise RendezvousError, on all of them."""
    return _host(params) if params.node_rank == 0 else _join(params)


def sanitized(text: object) -> str:
    """Text from another node, shortened and safe to print."""
    return visible(str(text)[:1000])


@contextlib.contextmanager
def _raising_if_lost(message: str) -> Iterator[None]:
    """RendezvousError with the message for a peer that is lost."""
    try:
        yield
    except PeerLost as error:
        raise RendezvousError(message.format(error)) from None


class WaitingLog:
    """Logs who is missing: at once, and then at intervals."""

    def __init__(self, params: RendezvousParameters):
        self.params = params
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
            logger.info(f"node {self.params.node_rank}: waiting for {missing}{detail}, {up_to}")


# -- node 0 ----------------------------------------------------------------------------------------


def _host(params: RendezvousParameters) -> "Rendezvous":
    peers: dict[int, Peer] = {}
    try:
        with listen(params.port) as server:
            _connect_all(server, peers, params)
        for node, peer in peers.items():
            with _raising_if_lost(f"node {node} has left before the run started: {{}}"):
                peer.send(go=True)
    except RendezvousError as error:
        message = str(error) if params.secret else WITHHELD
        for peer in peers.values():
            with contextlib.suppress(PeerLost):
                peer.send(error=message, ended=message)  # `ended` is for those that were already told to start
            peer.close()
        raise
    return Rendezvous(params, peers)


def _connect_all(server: socket.socket, peers: dict[int, Peer], params: RendezvousParameters) -> None:
    waiting = WaitingLog(params)
    sent, sent_time = "", 0.0
    pending = PendingHandshakes(server, params.secret, lambda line: logger.info(f"node 0, port {params.port}: {line}"))
    with contextlib.closing(pending):
        while missing := sorted(set(range(1, params.nnodes)) - peers.keys()):
            names, now = f"{named('node', missing)} of {params.nnodes}", time.monotonic()
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
                    logger.info(f"node 0: node {node} ({peer.address}) has left")
            for peer, hello in pending.advance(ready):
                _admit(peer, hello, peers, params)


def _admit(peer: Peer, hello: Hello, peers: dict[int, Peer], params: RendezvousParameters) -> None:
    node = hello.node_rank
    if hello.nnodes != params.nnodes:
        message = f"node {node} ({peer.address}) has NODES={hello.nnodes}, node 0 has NODES={params.nnodes}"
    elif hello.must_agree != params.must_agree:
        message = f"node {node} ({peer.address}) has {sanitized(hello.must_agree)}; node 0: {params.must_agree}"
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


# -- the other nodes -------------------------------------------------------------------------------


def _join(params: RendezvousParameters) -> "Rendezvous":
    peer = _connect(params)
    waiting, timeout = WaitingLog(params), params.timeout + HANDSHAKE_TIMEOUT
    with contextlib.ExitStack() as stack, _raising_if_lost("node 0 has left before the run started: {}"):
        stack.callback(peer.close)
        while (message := peer.receive(timeout)) is not None:
            if "error" in message:
                raise RendezvousError(sanitized(message["error"]))
            if "go" in message:
                stack.pop_all()
                return Rendezvous(params, {0: peer})
            if "waiting" in message:
                waiting.log(sanitized(message["waiting"]))
    raise RendezvousError(f"node 0 sent nothing for {timeout:.0f} s")


def _connect(params: RendezvousParameters) -> Peer:
    waiting = WaitingLog(params)
    pause = 0.1
    while True:
        reason = f"what answers there is not a launcher of this run, or has another {SECRET}"
        try:
            connection = socket.create_connection((params.address, params.port), timeout=HANDSHAKE_TIMEOUT)
            peer = Peer(connection, params.address)
            if authenticate(peer, params.secret, params.node_rank, params.nnodes, params.must_agree):
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


# -- while the run goes on -------------------------------------------------------------------------


@dataclass
class Rendezvous:
    """Connections to other launchers of the run: on node 0 to all, on the others to node 0."""

    params: RendezvousParameters
    peers: dict[int, Peer] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # node -> a failure that a restart may get past
    ended: set[int] = field(default_factory=set)  # nodes that have ended, with or without an error
    gone: list[Peer] = field(default_factory=list)  # their connections, which a node that has stopped may wait for
    is_user_error: bool = False  # one of them ended by an error that its user has to fix

    def poll_failure(self) -> str | None:
        """Why the run cannot go on: what failed on another node. Does not wait."""
        for node, peer in list(self.peers.items()):
            if not peer.has_data():
                continue
            try:
                message = self._receive(node, peer, HANDSHAKE_TIMEOUT)
            except PeerLost:
                message = LAUNCHER_GONE
            if message:
                return _end_of(node, message)
        return None

    def _receive(self, node: int, peer: Peer, timeout: float) -> str | None:
        """How its ranks ended; keeps the connection if a restart is possible. Raises PeerLost."""
        message: dict[str, object] | None = {}
        try:
            message = peer.receive(timeout)
        finally:
            if not message or "failed" not in message:
                self.gone.append(self.peers.pop(node))
                self.ended.add(node)
        if message and "failed" in message:
            self.failed[node] = sanitized(message["failed"])
            return self.failed[node]
        if not message or "ended" not in message:
            return "its launcher sent an invalid message"
        self.is_user_error = self.is_user_error or bool(message.get("is_user_error"))
        return sanitized(message["ended"] or "")

    def record_failure(self, folder: Path) -> None:
        """Write another node's failure beside those of the ranks here (rank.record_failure)."""
        had_user_error, file = self.is_user_error, folder / "elsewhere.json"
        if message := self.poll_failure():
            reason = {"message": message, "traceback": "", "time": time.time(), "rank": None}
            if file.exists() and self.is_user_error == had_user_error:  # only a user error replaces the first failure
                reason = json.loads(file.read_text())
            reason |= {"is_user_error": self.is_user_error, "can_restart": bool(self.failed) and not self.ended}
            file.with_suffix(".new").write_text(json.dumps(reason))
            file.with_suffix(".new").replace(file)

    def regroup(self, message: str, choose_port: Callable[[], int]) -> int:
        """Wait until the ranks of all nodes have ended by a failure that a restart may get past.

        message: the failure of this node. choose_port: called on node 0, once nobody is at the old
        port any more. Returns the port for the next ranks, which is the same on all nodes. Raises
        RendezvousError, on all nodes, if one of them cannot restart.
        """
        for node, peer in list(self.peers.items()):
            with _raising_if_lost(f"node {node} ended: {LAUNCHER_GONE}"):
                peer.send(failed=message)
        for node, peer in list(self.peers.items()):
            with _raising_if_lost(f"node {node} ended: {LAUNCHER_GONE}"):
                reason = None if node in self.failed else self._receive(node, peer, REPLY_TIMEOUT)
            if reason and node in self.ended:
                raise RendezvousError(_end_of(node, reason))
        if self.ended:
            raise RendezvousError(f"node {min(self.ended)} has ended, and does not restart")
        self.failed.clear()
        if self.params.node_rank == 0:
            port = choose_port()
            for node, peer in self.peers.items():
                with _raising_if_lost(f"node {node} ended: {LAUNCHER_GONE}"):
                    peer.send(port=port)
            return port
        with _raising_if_lost(f"node 0 ended: {LAUNCHER_GONE}"):
            reply = self.peers[0].receive(REPLY_TIMEOUT) or {}
        chosen = reply.get("port")
        if type(chosen) is not int or not 0 < chosen < 1 << 16:
            raise RendezvousError(f"node 0 ended: {sanitized(reply.get('ended') or 'it sent nothing more')}")
        return chosen

    def close(self, message: str | None, is_user_error: bool = False, has_stopped: bool = False) -> None:
        """Tell the others how this node ended. message: its failure, if any.

        A node that has stopped waits for node 0, which may still be writing: schedulers kill a job
        once one of its nodes exits with another code than 0.
        """
        for peer in self.peers.values():
            with contextlib.suppress(PeerLost):
                peer.send(ended=message, is_user_error=is_user_error)
                if has_stopped and self.params.node_rank:
                    peer.receive(REPLY_TIMEOUT)
        for peer in [*self.peers.values(), *self.gone]:
            peer.close()
        self.peers.clear()


def _end_of(node: int, message: str) -> str:
    """The end of a node; its message may already report the end of a third one."""
    return message if message.startswith("node ") else f"node {node} ended: {message}"
