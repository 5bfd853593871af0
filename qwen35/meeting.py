"""The launchers of all machines meet before anything starts, say whether they agree, and stay in touch until the end.

Machine 0 listens at MASTER_PORT, the others come; each message is a line of JSON. When all are there, machine 0 asks for
their clocks, for what must agree, and whether they see its save folder; it compares, and tells everybody to go on or why not.
Then it no longer listens, so that the processes of the run can meet at the same port. The connections stay: how one
machine ends is known on the others at once, and not when a time-out of theirs has passed. This needs no torch, so it is quick.

Clocks are compared and told, and never refused: nothing in a run depends on another machine's clock, but who reads logs and
file times, or the checkpoints' dates, should know.
"""

import contextlib
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.agreement import disagreements, machines, present, seen
from qwen35.errors import USER_ERRORS, one_line
from qwen35.machines import ANSWER, Meeting, MeetingError, Place
from qwen35.peer import HELLO, Left, Peer

GREETING = "qwen35 launcher"
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


def listen(port: int) -> socket.socket:
    """As the store of the processes does: IPv6 that takes IPv4 too, where the machine has it. Raises OSError."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _host(place: Place, talk: Talk) -> Meeting:
    peers: dict[int, Peer] = {}
    try:
        with listen(place.port) as server:
            _gather(server, peers, place, talk)
        for line in _clocks(peers, talk):
            talk.say(line)
        _agree(peers, talk)
        _share(peers, talk)
        for machine, peer in peers.items():
            with _answering(machine):
                peer.tell(go=True)
    except MeetingError as error:
        for peer in peers.values():
            with contextlib.suppress(Left):
                peer.tell(error=str(error), ended=str(error))  # the second for who has been told to go on already
            peer.close()
        raise
    return Meeting(place, peers)


def _gather(server: socket.socket, peers: dict[int, Peer], place: Place, talk: Talk) -> None:
    waiting = Waiting(place, talk)
    while missing := sorted(set(range(1, place.machines)) - peers.keys()):
        whom = f"{machines(missing)} of {place.machines}"
        if waiting.left <= 0:
            raise MeetingError(
                f"{whom} did not come to MASTER_PORT={place.port} of machine 0 within {place.timeout:.0f} s: was the run"
                f" started there, with NODES={place.machines}, a NODE_RANK of its own and this machine's MASTER_ADDR?"
            )
        waiting.say(whom, f"port {place.port}")
        for peer in peers.values():
            with contextlib.suppress(Left):  # it is missed below
                peer.tell(waiting=whom)
        sockets = [server, *(peer.connection for peer in peers.values())]
        ready = select.select(sockets, [], [], min(NEWS, max(0.0, waiting.left)))[0]
        for machine, peer in list(peers.items()):
            if peer.connection in ready:  # it has nothing to say yet
                del peers[machine]
                peer.close()
                talk.say(f"machine 0: machine {machine} ({peer.address}) has left")
        if server in ready:
            connection, address = server.accept()
            _admit(Peer(connection, address[0].removeprefix("::ffff:")), peers, place, talk)


def _admit(peer: Peer, peers: dict[int, Peer], place: Place, talk: Talk) -> None:
    try:
        peer.tell(greeting=GREETING)
        hello = peer.hear(HELLO) or {}
    except Left:
        hello = {}
    machine, count = hello.get("machine"), hello.get("machines")
    if not isinstance(machine, int) or not isinstance(count, int):
        talk.say(f"machine 0: somebody at {peer.address} connects to port {place.port} and is no launcher of ours")
        peer.close()
        return
    if count != place.machines:
        words = f"machine {machine} ({peer.address}) has NODES={count}, machine 0 has NODES={place.machines}"
    elif machine == 0 or machine in peers:
        other = "the one that listens" if machine == 0 else peers[machine].address
        words = f"two machines have NODE_RANK={machine}: {other} and {peer.address}"
    else:
        peers[machine] = peer
        return
    with contextlib.suppress(Left):
        peer.tell(error=words)
    peer.close()
    raise MeetingError(words)


@contextlib.contextmanager
def _answering(machine: int) -> Iterator[None]:
    try:
        yield
    except Left as error:
        raise MeetingError(f"machine {machine} has left while the machines met: {error}") from None


def _answer(machine: int, peer: Peer) -> dict[str, Any]:
    with _answering(machine):
        answer = peer.hear(ANSWER)
    if answer is None:
        raise MeetingError(f"machine {machine} ({peer.address}) gave no answer within {ANSWER:.0f} s")
    if words := answer.get("error"):
        raise MeetingError(f"machine {machine}: {words}")
    return answer


def _clocks(peers: Mapping[int, Peer], talk: Talk) -> list[str]:
    lines = []
    for machine, peer in peers.items():
        before = talk.clock()
        with _answering(machine):
            peer.tell(clock=True)
        ahead = float(_answer(machine, peer)["time"]) - (before + talk.clock()) / 2
        if abs(ahead) > SKEW:
            words = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} machine 0's"
            lines.append(
                f"note: the clock of machine {machine} is {words}: the run does not care, but logs and files do"
            )
    return lines


def _agree(peers: Mapping[int, Peer], talk: Talk) -> None:
    for machine, peer in peers.items():
        with _answering(machine):
            peer.tell(facts=True)
    try:
        facts = {0: dict(talk.facts())}
    except USER_ERRORS as error:
        raise MeetingError(f"machine 0: {one_line(error)}") from None
    facts |= {machine: _answer(machine, peer)["facts"] for machine, peer in peers.items()}
    found = disagreements(facts)
    for one in found:
        talk.say(one.line)
    for machine, peer in peers.items():
        with _answering(machine):
            peer.tell(lines=[one.line for one in found if machine in one.machines])
    if found:
        count = "one thing" if len(found) == 1 else f"{len(found)} things"
        raise MeetingError(f"the machines differ in {count}, told above: nothing was started")


def _share(peers: Mapping[int, Peer], talk: Talk) -> None:
    """The save folder is the same one everywhere, and all may write there."""
    try:
        with present(talk.save) as token:
            for machine, peer in peers.items():
                with _answering(machine):
                    peer.tell(look=token)
            blind = [machine for machine, peer in peers.items() if not _answer(machine, peer)["seen"]]
    except OSError as error:
        raise MeetingError(f"training.save: {one_line(error)}") from None
    if blind:
        verb = "does" if len(blind) == 1 else "do"
        raise MeetingError(
            f"{machines(blind)} {verb} not see what machine 0 writes in {talk.save}: name a training.save on a file system"
            " that all machines share"
        )


# -- the others ----------------------------------------------------------------------------------------------------------


def _join(place: Place, talk: Talk) -> Meeting:
    peer = _connect(place, talk)
    seconds = place.timeout + ANSWER
    waiting = Waiting(place, talk)
    try:
        peer.tell(machine=place.machine, machines=place.machines)
        while True:
            message = peer.hear(seconds)
            if message is None:
                raise MeetingError(f"machine 0 has said nothing for {seconds:.0f} s")
            if "error" in message:
                raise MeetingError(str(message["error"]))
            if "go" in message:
                return Meeting(place, {0: peer})
            if "waiting" in message:
                waiting.say(str(message["waiting"]))
            for line in message.get("lines", ()):
                talk.say(line)
            if answer := _reply(message, talk):
                peer.tell(**answer)
    except Left as error:
        peer.close()
        raise MeetingError(f"machine 0 has left while the machines met: {error}") from None
    except MeetingError:
        peer.close()
        raise


def _reply(message: Mapping[str, Any], talk: Talk) -> dict[str, Any]:
    """To what machine 0 asks; nothing where it does not."""
    try:
        if "clock" in message:
            return {"time": talk.clock()}
        if "facts" in message:
            return {"facts": dict(talk.facts())}
        if "look" in message:
            return {
                "seen": seen(talk.save, str(message["look"]), SLOW_DISK if talk.patience is None else talk.patience)
            }
    except USER_ERRORS as error:
        return {"error": one_line(error)}
    return {}


def _connect(place: Place, talk: Talk) -> Peer:
    waiting = Waiting(place, talk)
    pause = 0.1
    while True:
        why = "something answers there that is no launcher: is an earlier run still at that port?"
        try:
            peer = Peer(socket.create_connection((place.address, place.port), timeout=HELLO), place.address)
            is_own = peer.connection.getsockname() == peer.connection.getpeername()  # Linux lets a port call itself
            greeting = None if is_own else peer.hear(HELLO)
            if greeting and greeting.get("greeting") == GREETING:
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
