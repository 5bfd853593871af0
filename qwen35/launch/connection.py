"""A connection between the launchers of two nodes, and how they prove that they are of one run.

Each message is a line of JSON. Before any other, each side sends a challenge, and answers with a
keyed hash (HMAC) of both challenges. The key is RENDEZVOUS_SECRET, which is never sent. Without a
secret the key is empty and proves nothing.

(multiprocessing.connection authenticates too, but by MD5 before Python 3.12, one peer after the
other, and without a time limit.)
"""

import contextlib
import hmac
import json
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from qwen35.errors import SettingError, one_line

SECRET = "RENDEZVOUS_SECRET"
MIN_SECRET_LENGTH = 16  # characters: an eavesdropper of a handshake can try out keys offline
GREETING = "qwen35 launcher"
MAX_MESSAGE_BYTES = 1 << 24
MAX_UNPROVEN_BYTES = 1 << 12  # of a message from a peer that has not proved anything yet
MAX_PENDING = 64  # connections of such peers at a time
HANDSHAKE_TIMEOUT = 5.0  # seconds that a new connection has for each step of the handshake
# a node without power is detected in 3 minutes
KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 8}


class PeerLost(Exception):  # noqa: N818  # not yet an error: who waits for the peer decides
    """The other end closed the connection, or does not follow the protocol."""


class Peer:
    """The launcher of another node."""

    def __init__(self, connection: socket.socket, address: str):
        self.connection, self.address = connection, address
        self.buffer = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, **message: Any) -> None:
        """Raises PeerLost."""
        try:
            self.connection.settimeout(HANDSHAKE_TIMEOUT)
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise PeerLost(one_line(error)) from None

    def receive(self, timeout: float, max_bytes: int = MAX_MESSAGE_BYTES) -> dict[str, Any] | None:
        """The next message; None if it is incomplete after `timeout` seconds. Raises PeerLost."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self.buffer and len(self.buffer) <= max_bytes:
            remaining = deadline - time.monotonic()
            try:
                self.connection.settimeout(max(1e-3, remaining))
                data = self.connection.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError as error:
                raise PeerLost(one_line(error)) from None
            if not data:
                raise PeerLost("it closed the connection")
            self.buffer += data
            if remaining <= 0 and b"\n" not in data:  # a peer that drips bytes does not extend its time
                return None
        line, _, self.buffer = self.buffer.partition(b"\n")
        if len(line) > max_bytes:
            raise PeerLost("its message is too long")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise PeerLost("its message is not a JSON object")
        return message

    def has_data(self) -> bool:
        """Whether a message, or the end of the connection, can be read without waiting."""
        return bool(self.buffer or select.select([self.connection], [], [], 0)[0])

    def close(self) -> None:
        self.connection.close()


# -- the handshake ---------------------------------------------------------------------------------


def check_secret(secret: str) -> str:
    """Raises SettingError."""
    if secret and len(secret) < MIN_SECRET_LENGTH:
        raise SettingError(
            f"{SECRET} has fewer than {MIN_SECRET_LENGTH} characters; `openssl rand -hex 32` makes a good one"
        )
    return secret


def proof(secret: str, *fields: str | int) -> str:
    """A keyed hash of the fields, which only a process that knows the secret can compute."""
    return hmac.new(secret.encode(errors="surrogatepass"), json.dumps(fields).encode(), "sha256").hexdigest()


def is_proof(value: object, secret: str, *fields: str | int) -> bool:
    expected = proof(secret, *fields).encode()
    return isinstance(value, str) and hmac.compare_digest(value.encode(errors="replace"), expected)


class Hello(NamedTuple):
    node_rank: int
    nnodes: int
    must_agree: str  # what has to be the same on all nodes for the ranks to meet at all
    challenge: str


def read_hello(message: Mapping[str, Any], challenge: str, secret: str) -> Hello | None:
    """None if the message does not answer the challenge."""
    hello = Hello(*map(message.get, Hello._fields))  # type: ignore[arg-type]  # types are checked next
    if [type(value) for value in hello] != [int, int, str, str]:
        return None
    is_proven = is_proof(message.get("proof"), secret, "join", challenge, *hello)
    return hello if is_proven and 0 <= hello.node_rank < hello.nnodes else None


def authenticate(peer: Peer, secret: str, node_rank: int, nnodes: int, must_agree: str) -> bool:
    """Prove membership of the run to node 0; whether it proved the same. Raises PeerLost."""
    if peer.connection.getsockname() == peer.connection.getpeername():  # Linux lets a port connect to itself
        return False
    greeting = peer.receive(HANDSHAKE_TIMEOUT, MAX_UNPROVEN_BYTES) or {}
    hello, challenge = Hello(node_rank, nnodes, must_agree, secrets.token_hex(16)), greeting.get("challenge")
    if greeting.get("greeting") != GREETING or not isinstance(challenge, str):
        return False
    peer.send(**hello._asdict(), proof=proof(secret, "join", challenge, *hello))
    answer = peer.receive(HANDSHAKE_TIMEOUT, MAX_UNPROVEN_BYTES) or {}
    return is_proof(answer.get("proof"), secret, "host", hello.challenge, challenge)


class PendingHandshakes:
    """Peers that have connected to node 0 and proved nothing yet: many at a time, none for long."""

    def __init__(self, server: socket.socket, secret: str, log: Callable[[str], None]):
        self.server, self.secret, self.log = server, secret, log
        self.pending: dict[str, tuple[float, Peer]] = {}  # challenge -> deadline, peer
        self.reported: set[str] = set()  # addresses of rejected peers
        server.setblocking(False)  # a peer may be gone again before it is accepted

    @property
    def sockets(self) -> list[socket.socket]:
        return [self.server, *(peer.connection for _, peer in self.pending.values())]

    @property
    def deadline(self) -> float:
        """The earliest deadline of all pending peers."""
        return min((deadline for deadline, _ in self.pending.values()), default=float("inf"))

    def advance(self, ready: list[socket.socket]) -> Iterator[tuple[Peer, Hello]]:
        """The peers among `ready` that proved to belong to this run, and got the same proof."""
        for challenge, (deadline, peer) in list(self.pending.items()):
            try:
                message = peer.receive(0, MAX_UNPROVEN_BYTES) if peer.connection in ready else None
            except PeerLost:
                message = {}
            if message is None and time.monotonic() < deadline:
                continue
            if hello := read_hello(message or {}, challenge, self.secret):
                del self.pending[challenge]
                with contextlib.suppress(PeerLost):  # the caller notices when it next uses the peer
                    peer.send(proof=proof(self.secret, "host", hello.challenge, challenge))
                yield peer, hello
            else:
                self._reject(challenge)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, address = self.server.accept()
            peer, challenge = Peer(connection, address[0].removeprefix("::ffff:")), secrets.token_hex(16)
            self.pending[challenge] = time.monotonic() + HANDSHAKE_TIMEOUT, peer
            with contextlib.suppress(PeerLost):
                peer.send(greeting=GREETING, challenge=challenge)
            if len(self.pending) > MAX_PENDING:
                self._reject(next(iter(self.pending)))

    def _reject(self, challenge: str) -> None:
        _, peer = self.pending.pop(challenge)
        peer.close()
        if peer.address not in self.reported:
            self.reported.add(peer.address)
            self.log(f"a connection from {peer.address} is not a launcher of this run, or has another {SECRET}")

    def close(self) -> None:
        for _, peer in self.pending.values():
            peer.close()
