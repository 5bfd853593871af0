"""How launchers prove to each other that they belong to one run, before either says more than that it is a launcher.

Each sends a challenge, and a keyed hash (HMAC) of both challenges back. The key is RENDEZVOUS_SECRET, which is never sent.
Where none is set the key is empty and proves nothing.
"""

import contextlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from qwen35.errors import SettingError
from qwen35.launch.connection import HELLO, Left, Peer
from qwen35.launch.nodes import Place

SECRET = "RENDEZVOUS_SECRET"
SHORTEST = 16  # characters of it: who hears a handshake can try out keys
GREETING = "qwen35 launcher"
MOST_BYTES = 1 << 12  # of a message of somebody who has not proved anything yet
MOST = 64  # connections of such, at a time


def check_secret(secret: str) -> str:
    """Raises SettingError."""
    if secret and len(secret) < SHORTEST:
        raise SettingError(f"{SECRET} has fewer than {SHORTEST} characters; `openssl rand -hex 32` makes a good one")
    return secret


def proof(secret: str, *words: str | int) -> str:
    """What only who knows the secret can say of these words."""
    return hmac.new(secret.encode(errors="surrogatepass"), json.dumps(words).encode(), "sha256").hexdigest()


def is_proof(value: object, secret: str, *words: str | int) -> bool:
    return isinstance(value, str) and hmac.compare_digest(
        value.encode(errors="replace"), proof(secret, *words).encode()
    )


class Hello(NamedTuple):
    machine: int
    machines: int
    challenge: str


def read_hello(message: Mapping[str, Any], challenge: str, secret: str) -> Hello | None:
    """None if it does not answer the challenge."""
    hello = Hello(*map(message.get, Hello._fields))  # type: ignore[arg-type]  # that is what is found out next
    if type(hello.machine) is not int or type(hello.machines) is not int or not isinstance(hello.challenge, str):
        return None
    is_known = is_proof(message.get("proof"), secret, "join", challenge, *hello)
    return hello if is_known and 0 <= hello.machine < hello.machines else None


class Handshakes:
    """Those that have connected to machine 0 and have not proved anything yet: many at a time, none for long."""

    def __init__(self, server: socket.socket, secret: str, say: Callable[[str], None]):
        self.server, self.secret, self.say = server, secret, say
        self.guests: dict[str, tuple[float, Peer]] = {}  # challenge -> until when it may be answered, and by whom
        self.named: set[str] = set()  # addresses of strangers
        server.setblocking(False)  # who connected may have left before it is accepted

    @property
    def sockets(self) -> list[socket.socket]:
        return [self.server, *(guest.connection for _, guest in self.guests.values())]

    @property
    def end(self) -> float:
        """When the first of them has had its time."""
        return min((end for end, _ in self.guests.values()), default=float("inf"))

    def go_on(self, ready: list[socket.socket]) -> Iterator[tuple[Peer, Hello]]:
        """Those of `ready` that prove to be launchers of this run, to whom the same has been proved."""
        for challenge, (end, guest) in list(self.guests.items()):
            try:
                message = guest.hear(0, MOST_BYTES) if guest.connection in ready else None
            except Left:
                message = {}
            if message is None and time.monotonic() < end:
                continue
            if hello := read_hello(message or {}, challenge, self.secret):
                del self.guests[challenge]
                with contextlib.suppress(Left):  # it is missed by who waits for it
                    guest.tell(proof=proof(self.secret, "host", hello.challenge, challenge))
                yield guest, hello
            else:
                self._turn_away(challenge)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, address = self.server.accept()
            guest, challenge = Peer(connection, address[0].removeprefix("::ffff:")), secrets.token_hex(16)
            self.guests[challenge] = time.monotonic() + HELLO, guest
            with contextlib.suppress(Left):
                guest.tell(greeting=GREETING, challenge=challenge)
            if len(self.guests) > MOST:
                self._turn_away(next(iter(self.guests)))

    def _turn_away(self, challenge: str) -> None:
        _, guest = self.guests.pop(challenge)
        guest.close()
        if guest.address not in self.named:
            self.named.add(guest.address)
            self.say(f"somebody at {guest.address} connects and is no launcher of this run, or has another {SECRET}")

    def close(self) -> None:
        for _, guest in self.guests.values():
            guest.close()


def introduce(peer: Peer, place: Place) -> bool:
    """Prove to machine 0 that this is a launcher of the run. Whether it has proved the same. Raises Left."""
    if peer.connection.getsockname() == peer.connection.getpeername():  # Linux lets a port call itself
        return False
    greeting = peer.hear(HELLO, MOST_BYTES) or {}
    hello = Hello(place.machine, place.machines, secrets.token_hex(16))
    challenge = greeting.get("challenge")
    if greeting.get("greeting") != GREETING or not isinstance(challenge, str):
        return False
    peer.tell(**hello._asdict(), proof=proof(place.secret, "join", challenge, *hello))
    answer = peer.hear(HELLO, MOST_BYTES) or {}
    return is_proof(answer.get("proof"), place.secret, "host", hello.challenge, challenge)
