"""A connection between the launchers of two nodes: each message is a line of JSON."""

import json
import select
import socket
import time
from typing import Any

from qwen35.errors import one_line

MAX_MESSAGE_BYTES = 1 << 24
HANDSHAKE_TIMEOUT = 5.0  # seconds that a new connection has for each step of the handshake
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 8}  # a node without power is noticed in 3 minutes


class PeerLost(Exception):  # noqa: N818  # not yet an error: who waits for the peer decides
    """The other end closed the connection, or does not follow the protocol."""


class Peer:
    """The launcher of another node."""

    def __init__(self, connection: socket.socket, address: str):
        self.connection, self.address = connection, address
        self.buffer = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

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
