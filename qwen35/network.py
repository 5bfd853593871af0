"""This machine's network interfaces and their addresses."""

import socket

import psutil

from qwen35.errors import SettingError

LOOPBACK = "127.0.0.1"
STORE_LISTENER = "QWEN35_STORE_LISTENER"  # rank 0's inherited socket at MASTER_PORT, in a run of one node


def interface_of(address: str, variable: str = "NODE_ADDR") -> str:
    """The interface that has this address (or a host name's). Raises SettingError."""
    families = (socket.AF_INET, socket.AF_INET6)
    interfaces = {  # address -> interface
        info.address.partition("%")[0]: name
        for name, infos in psutil.net_if_addrs().items()
        for info in infos
        if info.family in families
    }
    try:
        wanted = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(address, None)}
    except (OSError, UnicodeError):
        raise SettingError(f"{variable}={address}: no host of that name is known here") from None
    for found in sorted(wanted & interfaces.keys()):
        return interfaces[found]
    known = ", ".join(f"{name} {each}" for each, name in interfaces.items())
    raise SettingError(
        f"{variable}={address}: no network interface of this machine has that address; there are {known}"
    )
