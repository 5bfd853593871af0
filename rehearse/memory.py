"""Live storages of the device: each once, however many tensors view it, from its first operator to its last reference."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rehearse.representatives import Cut, Moment
from rehearse.source_lines import place

KINDS = ("parameters", "optimizer", "gradients", "gathered", "activations", "other")
# FSDP's buffers: gathered parameters, and gradients that are yet to be scattered
GATHERED = ("fsdp::all_gather_copy_in", "fsdp::chunk_cat", "fsdp::split_with_sizes_copy", "aten::cat.out")
LARGE = 8 << 20  # bytes
PHASES = ("set-up", "forward", "backward", "optimizer")


@dataclass
class Peak:
    """The most bytes at one moment of a phase, and whose they were."""

    bytes: int = 0
    of: Counter[str] = field(default_factory=Counter)
    at: Counter[str] = field(default_factory=Counter)  # of the activations: the line that made them, for what is LARGE


@dataclass
class _Storage:
    number: int
    bytes: int
    alive: weakref.ref


class Ledger:
    """An Observer. What a storage was for shows after it is made, so every change is written down and summed up at the end.

    `moment` is set by who knows it. FSDP frees a gathered parameter by giving its storage no bytes, and fills it again: those
    storages, known by the operators that write them, are looked at again before every operator.
    """

    def __init__(self, device_type: str, cut: Cut | None = None) -> None:
        self.device_type, self.cut, self.moment = device_type, cut, Moment()
        self.doubles: Mapping[int, object] = {}  # addresses of storages that stand for another one
        self.live: dict[int, _Storage] = {}  # by address
        self.elastic: dict[int, _Storage] = {}  # by number: with bytes now, and perhaps without them at any moment
        self.kinds: dict[int, str] = {}  # number -> kind
        self.claims: Counter[int] = Counter()  # number -> for how many of the whole model it stands
        self.born: list[tuple[Moment, str]] = []  # number -> the moment and the line in which it was made
        self.changes: list[tuple[int, int, Moment]] = []  # number, bytes more or less

    def saw(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        for known in list(self.elastic.values()):
            self._look(known)
        is_gathering = func.name() in GATHERED
        for tensor in (*inputs, *outputs):
            if tensor.device.type == self.device_type and tensor.untyped_storage()._cdata not in self.doubles:
                known = self._known(tensor)
                if is_gathering:
                    self.kinds.setdefault(known.number, "gathered")
                    self.elastic[known.number] = known

    def claim(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """These are of that kind, whatever they seemed to be; the first claim holds against later ones. A tensor that is here
        several times stands for as many."""
        for tensor in tensors:
            if tensor.device.type == self.device_type:
                known = self._known(tensor)
                if self.kinds.get(known.number) in (None, "gathered"):
                    self.kinds[known.number] = kind
                self.claims[known.number] += 1

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.live

    def _known(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self.live.get(address)
        if known is None:
            known = _Storage(len(self.born), 0, weakref.ref(storage, lambda _: self._gone(address)))
            self.live[address] = known
            self.born.append((self.moment, place() if storage.nbytes() >= LARGE else ""))
        self._set(known, storage.nbytes())
        return known

    def _look(self, known: _Storage) -> None:
        storage = known.alive()
        self._set(known, 0 if storage is None else storage.nbytes())
        if not known.bytes:
            del self.elastic[known.number]

    def _gone(self, address: int) -> None:
        known = self.live.pop(address)
        self.elastic.pop(known.number, None)
        self._set(known, 0)

    def _set(self, known: _Storage, count: int) -> None:
        if count != known.bytes:
            self.changes.append((known.number, count - known.bytes, self.moment))
            known.bytes = count
            if count and self.kinds.get(known.number) == "gathered":
                self.elastic[known.number] = known

    def kind(self, number: int) -> str:
        born, _ = self.born[number]
        return self.kinds.get(number) or ("activations" if born.phase in ("forward", "backward") else "other")

    def peaks(self) -> dict[str, Peak]:
        """Of each phase of the whole step. What is alive at its start counts in it."""
        peaks = {phase: Peak() for phase in PHASES}
        now: Counter[str] = Counter()
        at: Counter[str] = Counter()
        total = 0
        changes = [(change[2], change) for change in self.changes]
        for number, change, moment in self.cut.played(changes) if self.cut else self.changes:
            kind, change = self.kind(number), change * self._like(number, moment)
            now[kind] += change
            if kind == "activations":
                at[self.born[number][1] or "smaller ones"] += change
            total += change
            if total > peaks[moment.phase].bytes:
                peaks[moment.phase] = Peak(total, now.copy(), at.copy())
        return peaks

    def _like(self, number: int, moment: Moment) -> int:
        """For how many this change stands, where it is not played again for each: of what was there before the step, and where
        what each layer left behind is let go of by something else."""
        if moment.phase == PHASES[0]:
            return self.claims[number] or 1
        born, _ = self.born[number]
        return self.cut.parts_like(born) if self.cut and born.kind and not moment.kind else 1

    def check(self) -> None:
        """Raises UnevenError."""
        seen: dict[Moment, list[tuple[str, str, int]]] = defaultdict(list)
        for number, change, moment in self.changes:
            kind = self.kind(number)
            seen[moment].append((kind, self.born[number][1] if kind == "activations" else "", change))
        if self.cut:
            self.cut.check(seen)
