"""A port for who must be told one before it listens there."""

import contextlib
import secrets
import socket


def free_port() -> int:
    """Below those that Linux gives to whoever connects or asks for any: none of these takes it before it is used."""
    while True:
        port = 12_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
