"""Another machine's launcher at the other end of a connection: each message is a line of JSON."""

import json
import select
import socket
import time
from typing import Any

from qwen35.errors import one_line

LONGEST = 1 << 24  # bytes of a message
HELLO = 5.0  # seconds that somebody who connects has to say who it is
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 8}  # a machine without power: missed in 3 minutes


class Left(Exception):  # noqa: N818  # which is no error yet
    """The other end closed the connection, or speaks another language."""


class Peer:
    """Another machine's launcher: messages over a connection."""

    def __init__(self, connection: socket.socket, address: str):
        self.connection, self.address = connection, address
        self.rest = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def tell(self, **message: Any) -> None:
        """Raises Left."""
        try:
            self.connection.settimeout(HELLO)
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Left(one_line(error)) from None

    def hear(self, seconds: float, most: int = LONGEST) -> dict[str, Any] | None:
        """The next message, of so many bytes at most; None if it is not whole in time. Raises Left."""
        end = time.monotonic() + seconds
        while b"\n" not in self.rest and len(self.rest) <= most:
            left = end - time.monotonic()
            try:
                self.connection.settimeout(max(1e-3, left))
                more = self.connection.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError as error:
                raise Left(one_line(error)) from None
            if not more:
                raise Left("it closed the connection")
            self.rest += more
            if left <= 0 and b"\n" not in more:  # a drop at a time is no answer in time
                return None
        line, _, self.rest = self.rest.partition(b"\n")
        if len(line) > most:
            raise Left("it says too much")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise Left("it speaks another language")
        return message

    def is_ready(self) -> bool:
        """Whether it says something, or has left."""
        return bool(select.select([self.connection], [], [], 0)[0])

    def close(self) -> None:
        self.connection.close()
