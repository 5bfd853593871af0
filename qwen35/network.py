"""This machine's network interfaces and their addresses."""

import socket

import psutil

from qwen35.errors import SettingError

LOOPBACK = "127.0.0.1"


def interface_of(address: str) -> str:
    """The interface of NODE_ADDR, which may be a name of this machine. Raises SettingError if none has it."""
    families = (socket.AF_INET, socket.AF_INET6)
    every = [(name, info) for name, found in psutil.net_if_addrs().items() for info in found if info.family in families]
    there = {info.address.partition("%")[0]: name for name, info in every}
    try:
        own = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(address, None)}
    except (OSError, UnicodeError):
        raise SettingError(f"NODE_ADDR={address}: no machine of that name is known here") from None
    for one in sorted(own & there.keys()):
        return there[one]
    known = ", ".join(f"{name} {one}" for one, name in there.items())
    raise SettingError(f"NODE_ADDR={address}: no network interface of this machine has that address; there are {known}")
