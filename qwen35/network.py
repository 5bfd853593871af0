"""This machine's network interfaces and their addresses, as Linux tells them."""

import fcntl
import socket
import struct
from ipaddress import IPv6Address
from pathlib import Path

from qwen35.errors import SettingError

SIOCGIFADDR = 0x8915  # of Linux's ioctl
IPV6 = Path("/proc/net/if_inet6")


def interface_addresses() -> dict[str, str]:
    """Address -> name of the interface that has it. Of several IPv4 addresses of one interface, the first."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            found[socket.inet_ntoa(answer[20:24])] = name
    for line in IPV6.read_text().splitlines() if IPV6.exists() else ():
        address, *_, name = line.split()
        found[str(IPv6Address(int(address, 16)))] = name
    return found


def interface_of(address: str) -> str:
    """The interface of NODE_ADDR, which may be a name of this machine. Raises SettingError if none has it."""
    there = interface_addresses()
    try:
        own = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(address, None)}
    except (OSError, UnicodeError):
        raise SettingError(f"NODE_ADDR={address}: no machine of that name is known here") from None
    for one in sorted(own):
        if one in there:
            return there[one]
    told = ", ".join(f"{name} {one}" for one, name in there.items())
    raise SettingError(f"NODE_ADDR={address}: no network interface of this machine has that address; there are {told}")
