"""The other nodes of a running job: all learn how one ends, and failed ranks restart together."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qwen35.errors import UserError, visible
from qwen35.launch.connection import HANDSHAKE_TIMEOUT, Peer, PeerLost

REPLY_TIMEOUT = 120.0  # seconds that a node has to answer once all nodes are connected
LAUNCHER_GONE = "its launcher is gone (killed, or the machine is down)"


class RendezvousError(UserError):
    """The nodes did not find each other, or do not agree."""


@dataclass(frozen=True)
class RendezvousParameters:
    """Which node this is, and where the nodes meet."""

    node_rank: int
    nnodes: int
    address: str  # of node 0
    port: int
    timeout: float  # seconds to wait for the last node
    secret: str = field(default="", repr=False)  # shared by the launchers of the run alone


@dataclass
class Rendezvous:
    """Connections to other launchers of the run: on node 0 to all, on the others to node 0."""

    params: RendezvousParameters
    peers: dict[int, Peer] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # node -> a failure that a restart may get past
    ended: set[int] = field(default_factory=set)  # nodes that have ended, with or without an error
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
                del self.peers[node]
                self.ended.add(node)
                peer.close()
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

    def regroup(self, message: str, port: int) -> int:
        """Wait until the ranks of all nodes have ended by a failure that a restart may get past.

        message: the failure of this node. port: on node 0, the port for the next ranks. Returns the
        port that node 0 chose. Raises RendezvousError, on all nodes, if one of them cannot restart.
        """
        for node, peer in list(self.peers.items()):
            with self._raising_if_lost(node):
                peer.send(failed=message)
        for node, peer in list(self.peers.items()):
            if node not in self.failed:
                with self._raising_if_lost(node):
                    reason = self._receive(node, peer, REPLY_TIMEOUT)
                if reason and node in self.ended:
                    raise RendezvousError(_end_of(node, reason))
        if self.ended:
            raise RendezvousError(f"node {min(self.ended)} has ended, and does not restart")
        self.failed.clear()
        if self.params.node_rank == 0:
            for node, peer in self.peers.items():
                with self._raising_if_lost(node):
                    peer.send(port=port)
            return port
        with self._raising_if_lost(0):
            reply = self.peers[0].receive(REPLY_TIMEOUT) or {}
        chosen = reply.get("port")
        if type(chosen) is not int or not 0 < chosen < 1 << 16:
            raise RendezvousError(f"node 0 ended: {sanitized(reply.get('ended') or 'it sent nothing more')}")
        return chosen

    @contextlib.contextmanager
    def _raising_if_lost(self, node: int) -> Iterator[None]:
        try:
            yield
        except PeerLost:
            raise RendezvousError(f"node {node} ended: {LAUNCHER_GONE}") from None

    def close(self, message: str | None, is_user_error: bool = False) -> None:
        """Tell the others how this node ended. message: its failure, if any."""
        for peer in self.peers.values():
            with contextlib.suppress(PeerLost):
                peer.send(ended=message, is_user_error=is_user_error)
            peer.close()
        self.peers.clear()


def sanitized(text: object) -> str:
    """Text from another node, shortened and safe to print."""
    return visible(str(text)[:1000])


def _end_of(node: int, message: str) -> str:
    """The end of a node; its message may already report the end of a third one."""
    return message if message.startswith("node ") else f"node {node} ended: {message}"
