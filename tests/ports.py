"""A free port, for programs that take its number as an argument."""

import contextlib
import secrets
import socket


def free_port() -> int:
    """Below the ephemeral ports, which Linux may give to another connection in between."""
    while True:
        port = 12_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
