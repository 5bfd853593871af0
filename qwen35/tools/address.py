"""MASTER_ADDR and MASTER_PORT, where the ranks and the launchers of a run meet."""

import os
import socket
import time

from qwen35.errors import SettingError
from qwen35.log import logger
from qwen35.network import LOOPBACK

DEFAULT_PORT = 6000  # of node 0; a run of one node takes any free one


def listen(port: int, is_alone: bool = False) -> socket.socket:
    """A socket at all IPv4 and IPv6 addresses, or at loopback for a single node. Raises OSError."""
    if is_alone:
        return socket.create_server((LOOPBACK, port))
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def check_address(host: str, port: int | None, is_alone: bool, timeout: float = 0.0) -> None:
    """The host must resolve, and a given port be free on this machine. Raises SettingError.

    timeout: seconds until the host must resolve. A cluster names a pod only after it has started.
    """
    deadline = time.monotonic() + timeout
    while not _resolves(host, port):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise SettingError(f"MASTER_ADDR={host}: no host of that name is known here")
        if remaining > timeout - 1:
            logger.info(f"waiting for the name {host}, up to {timeout:.0f} s (RENDEZVOUS_TIMEOUT)")
        time.sleep(min(1.0, remaining))
    try:
        if port:
            listen(port, is_alone).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise SettingError(
            f"MASTER_PORT={port} cannot be used on this machine ({why}): another program has it, perhaps an earlier run; set"
            f" another, e.g. MASTER_PORT={(port or 0) % 65535 + 1}"
        ) from None


def _resolves(host: str, port: int | None) -> bool:
    try:
        return bool(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError):
        return False
