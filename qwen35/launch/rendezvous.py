"""The launchers of all machines meet before anything starts, say whether they agree, and stay in touch until the end.

Machine 0 listens at MASTER_PORT, the others come; each message is a line of JSON. When all are there, machine 0 asks for
their clocks, for what must agree, and whether they see its save folder; it compares, and tells everybody to go on or why not.
Then it no longer listens, so that the processes of the run can meet at the same port. The connections stay: how one
machine ends is known on the others at once, and not when a time-out of theirs has passed. This needs no torch, so it is quick.

Strangers may reach the port. Who does not prove the secret (handshake.py) is told nothing, and holds up nobody. Where none is
set, everybody can: then salted hashes of what must agree are compared, and machine 0 alone says what differs.

Clocks are compared and told, and never refused: nothing in a run depends on another machine's clock, but who reads logs and
file times, or the checkpoints' dates, should know.
"""

import contextlib
import secrets
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.errors import USER_ERRORS, one_line
from qwen35.launch.connection import HELLO, Left, Peer
from qwen35.launch.consistency import disagreements, hashed, machines, present, seen, unhashed
from qwen35.launch.handshake import SECRET, Handshakes, Hello, introduce
from qwen35.launch.nodes import ANSWER, Meeting, MeetingError, Place, foreign
from qwen35.network import LOOPBACK

UNSAID = f"machine 0 says why the machines did not meet; where {SECRET} is set, all of them do"
NEWS, OFTEN = 5.0, 30.0  # seconds between two lines that say who is waited for: others than before, the same
SKEW = 5.0  # seconds that clocks may differ without a word
SLOW_DISK = 10.0  # seconds until a new file is seen on the other machines: file systems of a network keep what they saw


@dataclass(frozen=True)
class Talk:
    """What this machine has to say and to show."""

    facts: Callable[[], Mapping[str, str]]  # what must be the same everywhere; asked for when all are there
    save: Path
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    clock: Callable[[], float] = time.time
    patience: float | None = None  # default: SLOW_DISK


def meet(place: Place, talk: Talk) -> Meeting:
    """Until all machines are there and agree. Raises MeetingError, on all of them alike, if they do not."""
    return _host(place, talk) if place.machine == 0 else _join(place, talk)


class Waiting:
    """Says who is waited for: at once, and then now and then."""

    def __init__(self, place: Place, talk: Talk):
        self.place, self.talk = place, talk
        self.end = time.monotonic() + place.timeout
        self.told: str | None = None
        self.told_at = 0.0

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, whom: str, why: str = "") -> None:
        now = time.monotonic()
        if self.told is None or now - self.told_at > (OFTEN if whom == self.told else NEWS):
            self.told, self.told_at = whom, now
            up_to = f"up to {self.left:.0f} s more (RENDEZVOUS_TIMEOUT)"
            self.talk.say(f"machine {self.place.machine}: waiting for {whom}{why and f' ({why})'}, {up_to}")


# -- machine 0 -----------------------------------------------------------------------------------------------------------


def listen(port: int, is_alone: bool = False) -> socket.socket:
    """At every address, as torch's store does, IPv6 that takes IPv4 too; alone, at this machine's own. Raises OSError."""
    if is_alone:
        return socket.create_server((LOOPBACK, port))
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def free_port(is_alone: bool) -> int:
    """One that nobody listens at, as `listen` would. Raises OSError."""
    with listen(0, is_alone) as server:
        return server.getsockname()[1]


def _host(place: Place, talk: Talk) -> Meeting:
    peers: dict[int, Peer] = {}
    try:
        with listen(place.port) as server:
            _gather(server, peers, place, talk)
        _compare(peers, talk, place.secret)
        for machine, peer in peers.items():
            with _answering(machine):
                peer.tell(go=True)
    except MeetingError as error:
        words = str(error) if place.secret else UNSAID
        for peer in peers.values():
            with contextlib.suppress(Left):
                peer.tell(error=words, ended=words)  # the second for who has been told to go on already
            peer.close()
        raise
    return Meeting(place, peers)


def _gather(server: socket.socket, peers: dict[int, Peer], place: Place, talk: Talk) -> None:
    waiting = Waiting(place, talk)
    told, told_at = "", 0.0
    strangers = Handshakes(server, place.secret, lambda words: talk.say(f"machine 0, port {place.port}: {words}"))
    with contextlib.closing(strangers):
        while missing := sorted(set(range(1, place.machines)) - peers.keys()):
            whom, now = f"{machines(missing)} of {place.machines}", time.monotonic()
            if waiting.left <= 0:
                raise MeetingError(
                    f"{whom} did not come to MASTER_PORT={place.port} of machine 0 within {place.timeout:.0f} s: was the run"
                    f" started there, with NODES={place.machines}, a NODE_RANK of its own and this machine's MASTER_ADDR?"
                )
            waiting.say(whom, f"port {place.port}")
            if whom != told or now - told_at > NEWS:
                told, told_at = whom, now
                for peer in peers.values():
                    with contextlib.suppress(Left):  # it is missed below
                        peer.tell(waiting=whom)
            sockets = [*strangers.sockets, *(peer.connection for peer in peers.values())]
            seconds = min(now + NEWS, waiting.end, strangers.end) - time.monotonic()
            ready = select.select(sockets, [], [], max(0.0, seconds))[0]
            for machine, peer in list(peers.items()):
                if peer.connection in ready:  # it has nothing to say yet
                    del peers[machine]
                    peer.close()
                    talk.say(f"machine 0: machine {machine} ({peer.address}) has left")
            for peer, hello in strangers.go_on(ready):
                _admit(peer, hello, peers, place)


def _admit(peer: Peer, hello: Hello, peers: dict[int, Peer], place: Place) -> None:
    machine = hello.machine
    if hello.machines != place.machines:
        words = f"machine {machine} ({peer.address}) has NODES={hello.machines}, machine 0 has NODES={place.machines}"
    elif machine == 0 or machine in peers:
        other = "the one that listens" if machine == 0 else peers[machine].address
        words = f"two machines have NODE_RANK={machine}: {other} and {peer.address}"
    else:
        peers[machine] = peer
        return
    with contextlib.suppress(Left):
        peer.tell(error=words if place.secret else UNSAID)
    peer.close()
    raise MeetingError(words)


@contextlib.contextmanager
def _answering(machine: int) -> Iterator[None]:
    try:
        yield
    except Left as error:
        raise MeetingError(f"machine {machine} has left while the machines met: {error}") from None


def _compare(peers: Mapping[int, Peer], talk: Talk, secret: str) -> None:
    """Clocks are only told of; what must agree does, and the save folder is the same everywhere. Raises MeetingError."""
    salt, asked_at = secrets.token_hex(16), {}
    try:
        with present(talk.save) as token:
            for machine, peer in peers.items():
                asked_at[machine] = talk.clock()
                with _answering(machine):
                    peer.tell(look=token, salt=salt)
            facts = {0: dict(talk.facts())}
            answers = {machine: _answer(machine, peer) for machine, peer in peers.items()}
    except MeetingError:
        raise
    except USER_ERRORS as error:
        raise MeetingError(f"machine 0: {one_line(error)}") from None
    for machine, (clock, found, _) in answers.items():
        ahead = clock - asked_at[machine]
        if not abs(ahead) <= SKEW:  # or it is no number
            words = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} machine 0's"
            talk.say(f"note: the clock of machine {machine} is {words}: the run does not care, but logs and files do")
        facts[machine] = found if secret else unhashed(found, facts[0], salt)
    differences = disagreements(facts)
    for one in differences:
        talk.say(foreign(one.line))
    for machine, peer in peers.items():
        with _answering(machine):
            peer.tell(lines=[one.line for one in differences if secret and machine in one.machines])
    if differences:
        count = "one thing" if len(differences) == 1 else f"{len(differences)} things"
        raise MeetingError(f"the machines differ in {count}, told above: nothing was started")
    if blind := [machine for machine, (_, _, has_seen) in answers.items() if not has_seen]:
        verb = "does" if len(blind) == 1 else "do"
        raise MeetingError(
            f"{machines(blind)} {verb} not see what machine 0 writes in {talk.save}: name a training.save on a file system"
            " that all machines share"
        )


def _answer(machine: int, peer: Peer) -> tuple[float, dict[str, str], bool]:
    """Its clock, what must agree there, whether it sees the save folder. Raises MeetingError."""
    with _answering(machine):
        answer = peer.hear(ANSWER)
    who = f"machine {machine} ({peer.address})"
    if answer is None:
        raise MeetingError(f"{who} gave no answer within {ANSWER:.0f} s")
    if words := answer.get("error"):
        raise MeetingError(f"machine {machine}: {foreign(words)}")
    clock, facts, has_seen = (answer.get(name) for name in ("time", "facts", "seen"))
    if not (type(clock) is float and isinstance(facts, dict) and type(has_seen) is bool):
        raise MeetingError(f"{who} gave an answer that makes no sense")
    return clock, {name: str(value) for name, value in facts.items()}, has_seen


# -- the others ----------------------------------------------------------------------------------------------------------


def _join(place: Place, talk: Talk) -> Meeting:
    peer = _connect(place, talk)
    seconds = place.timeout + ANSWER
    waiting = Waiting(place, talk)
    try:
        while True:
            message = peer.hear(seconds)
            if message is None:
                raise MeetingError(f"machine 0 has said nothing for {seconds:.0f} s")
            if "error" in message:
                raise MeetingError(foreign(message["error"]))
            if "go" in message:
                return Meeting(place, {0: peer})
            if "waiting" in message:
                waiting.say(foreign(message["waiting"]))
            lines = message.get("lines")
            for line in lines if isinstance(lines, list) else ():
                talk.say(foreign(line))
            if "look" in message:
                peer.tell(**_reply(message, talk, place.secret))
    except Left as error:
        peer.close()
        raise MeetingError(f"machine 0 has left while the machines met: {error}") from None
    except MeetingError:
        peer.close()
        raise


def _reply(message: Mapping[str, Any], talk: Talk, secret: str) -> dict[str, Any]:
    """To what machine 0 asks. Raises MeetingError where it may not be told what went wrong here."""
    try:
        clock, facts = talk.clock(), dict(talk.facts())
        sees = seen(talk.save, str(message["look"]), SLOW_DISK if talk.patience is None else talk.patience)
    except USER_ERRORS as error:
        if not secret:
            raise MeetingError(one_line(error)) from None
        return {"error": one_line(error)}
    return {"time": clock, "facts": facts if secret else hashed(facts, str(message.get("salt"))), "seen": sees}


def _connect(place: Place, talk: Talk) -> Peer:
    waiting = Waiting(place, talk)
    pause = 0.1
    while True:
        why = f"something answers there that is no launcher of this run, or has another {SECRET}"
        try:
            peer = Peer(socket.create_connection((place.address, place.port), timeout=HELLO), place.address)
            if introduce(peer, place):
                return peer
            peer.close()
        except Left:
            peer.close()
        except OSError as error:
            why = one_line(error)
        whom = f"machine 0 at {place.address}:{place.port}"
        if waiting.left <= 0:
            raise MeetingError(
                f"{whom} did not answer within {place.timeout:.0f} s: {why}; was the run started there, and do MASTER_ADDR,"
                " MASTER_PORT and the firewall lead to it?"
            )
        waiting.say(whom, why)
        time.sleep(min(pause, max(0.0, waiting.left)))
        pause = min(2 * pause, 1.0)
