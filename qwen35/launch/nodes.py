"""The other machines of a run, once it has begun: how one ends is known on all, and what failed is started again together."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qwen35.errors import UserError, visible
from qwen35.launch.connection import HELLO, Left, Peer

ANSWER = 120.0  # seconds for an answer, once all are there
GONE = "its launcher is gone, killed or with the machine"


class MeetingError(UserError):
    """The machines did not meet, or do not agree."""


@dataclass(frozen=True)
class Place:
    """Which machine this is, and where all meet."""

    machine: int
    machines: int
    address: str  # of machine 0
    port: int
    timeout: float  # seconds that the first to come waits for the last
    secret: str = field(default="", repr=False)  # that all launchers of the run know, and nobody else


@dataclass
class Meeting:
    """The other launchers of the run: all of them on machine 0, machine 0 on the others."""

    place: Place
    peers: dict[int, Peer] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # what may be tried again, by machine
    left: set[int] = field(default_factory=set)  # machines that have ended, well or not
    is_mistake: bool = False  # what ended one of them is its user's to mend

    def news(self) -> str | None:
        """Why the run cannot go on as it is: what failed on another machine. Does not wait."""
        for machine, peer in list(self.peers.items()):
            if not (peer.rest or peer.is_ready()):
                continue
            try:
                words = self._hear(machine, peer, HELLO)
            except Left:
                words = GONE
            if words:
                return _of(machine, words)
        return None

    def _hear(self, machine: int, peer: Peer, seconds: float) -> str | None:
        """How its ranks ended; the connection stays if they may be started again. Raises Left."""
        message: dict[str, object] | None = {}
        try:
            message = peer.hear(seconds)
        finally:
            if not message or "failed" not in message:
                del self.peers[machine]
                self.left.add(machine)
                peer.close()
        if message and "failed" in message:
            self.failed[machine] = foreign(message["failed"])
            return self.failed[machine]
        if not message or "ended" not in message:
            return "its launcher made no sense"
        self.is_mistake = self.is_mistake or bool(message.get("mistake"))
        return foreign(message["ended"] or "")

    def record_news(self, folder: Path) -> None:
        """As a failure that explains those of the processes here, beside theirs in `folder` (rank.record_failure)."""
        had_mistake, file = self.is_mistake, folder / "elsewhere.json"
        if words := self.news():
            reason = {"message": words, "traceback": "", "time": time.time(), "rank": None, "expected": True}
            if file.exists() and self.is_mistake == had_mistake:  # the first failure explains the others, or a mistake
                reason = json.loads(file.read_text())
            reason |= {"mistake": self.is_mistake, "again": bool(self.failed) and not self.left}
            file.with_suffix(".new").write_text(json.dumps(reason))
            file.with_suffix(".new").replace(file)

    def regroup(self, words: str, port: int) -> int:
        """The ranks here have ended by a failure that may be tried again: wait until they have on all machines.

        words: the failure. port: on machine 0, where the next ranks can meet. Returns the port that machine 0 gives. Raises
        MeetingError, on all machines, if one of them cannot go on.
        """
        for machine, peer in list(self.peers.items()):
            with self._staying(machine):
                peer.tell(failed=words)
        for machine, peer in list(self.peers.items()):
            if machine not in self.failed:
                with self._staying(machine):
                    why = self._hear(machine, peer, ANSWER)
                if why and machine in self.left:
                    raise MeetingError(_of(machine, why))
        if self.left:
            raise MeetingError(f"machine {min(self.left)} has ended, and does not start again")
        self.failed.clear()
        if self.place.machine == 0:
            for machine, peer in self.peers.items():
                with self._staying(machine):
                    peer.tell(port=port)
            return port
        with self._staying(0):
            answer = self.peers[0].hear(ANSWER) or {}
        given = answer.get("port")
        if type(given) is not int or not 0 < given < 1 << 16:
            raise MeetingError(f"machine 0 ended: {foreign(answer.get('ended') or 'it has said nothing more')}")
        return given

    @contextlib.contextmanager
    def _staying(self, machine: int) -> Iterator[None]:
        try:
            yield
        except Left:
            raise MeetingError(f"machine {machine} ended: {GONE}") from None

    def close(self, words: str | None, is_mistake: bool = False) -> None:
        """Tell the others how this machine ended: None if well."""
        for peer in self.peers.values():
            with contextlib.suppress(Left):
                peer.tell(ended=words, mistake=is_mistake)
            peer.close()
        self.peers.clear()


def foreign(words: object) -> str:
    """What another machine says, fit to be printed."""
    return visible(str(words)[:1000])


def _of(machine: int, words: str) -> str:
    """What is told of a machine's end, which may be of another's already."""
    return words if words.startswith("machine ") else f"machine {machine} ended: {words}"
