"""The live storages of a device, each once, however many tensors view it."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rehearse.representatives import Moment, Representatives
from rehearse.source_lines import calling_line

KINDS = ("parameters", "optimizer", "gradients", "gathered", "activations", "other")
# write FSDP's buffers: gathered parameters, and gradients that are yet to be reduce-scattered
GATHERING = ("fsdp::all_gather_copy_in", "fsdp::chunk_cat", "fsdp::split_with_sizes_copy", "aten::cat.out")
LARGE = 8 << 20  # bytes of a storage whose line is looked up
PHASES = ("set-up", "forward", "backward", "optimizer")


@dataclass
class Peak:
    """The most bytes that were alive at one moment of a phase."""

    bytes: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    by_line: Counter[str] = field(default_factory=Counter)  # the activations, by the line that made them


@dataclass
class _Storage:
    number: int
    bytes: int
    alive: weakref.ref


class Ledger:
    """An Observer that records every change, since the kind of a storage may be known only later.

    PhaseTracker sets `moment`. FSDP frees a gathered parameter by resizing its storage to 0 bytes,
    and later fills it again: such storages, known by the operators that write them, are measured
    anew before every operator.
    """

    def __init__(self, device_type: str, representatives: Representatives | None = None) -> None:
        self.device_type, self.representatives, self.moment = device_type, representatives, Moment()
        self.doubles: Mapping[int, object] = {}  # addresses of storages that stand for another one
        self.live: dict[int, _Storage] = {}  # by address
        self.resizable: dict[int, _Storage] = {}  # by number: with bytes now, and perhaps without them later
        self.kinds: dict[int, str] = {}  # number -> kind
        self.claims: Counter[int] = Counter()  # number -> how many tensors of the whole model it represents
        self.born: list[tuple[Moment, str]] = []  # number -> the moment and the line in which it was made
        self.changes: list[tuple[int, int, Moment]] = []  # number, bytes gained or lost

    def observe(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        # some hundred before each operator, of which none has changed as a rule
        for known in [k for k in self.resizable.values() if (x := k.alive()) is None or x.nbytes() != k.bytes]:
            self._measure(known)
        is_gathering = func.name() in GATHERING
        for tensor in (*inputs, *outputs):
            if tensor.device.type == self.device_type and tensor.untyped_storage()._cdata not in self.doubles:
                storage = self._storage(tensor)
                if is_gathering:
                    self.kinds.setdefault(storage.number, "gathered")
                    self.resizable[storage.number] = storage

    def claim(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Declare the kind of tensors; the first claim holds. One given n times represents n."""
        for tensor in tensors:
            if tensor.device.type == self.device_type:
                storage = self._storage(tensor)
                if self.kinds.get(storage.number) in (None, "gathered"):
                    self.kinds[storage.number] = kind
                self.claims[storage.number] += 1

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.live

    def _storage(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self.live.get(address)
        if known is None:
            known = _Storage(len(self.born), 0, weakref.ref(storage, lambda _: self._freed(address)))
            self.live[address] = known
            self.born.append((self.moment, calling_line() if storage.nbytes() >= LARGE else ""))
        self._resized(known, storage.nbytes())
        return known

    def _measure(self, known: _Storage) -> None:
        storage = known.alive()
        self._resized(known, 0 if storage is None else storage.nbytes())
        if not known.bytes:
            del self.resizable[known.number]

    def _freed(self, address: int) -> None:
        known = self.live.pop(address)
        self.resizable.pop(known.number, None)
        self._resized(known, 0)

    def _resized(self, known: _Storage, size: int) -> None:
        if size != known.bytes:
            self.changes.append((known.number, size - known.bytes, self.moment))
            known.bytes = size
            if size and self.kinds.get(known.number) == "gathered":
                self.resizable[known.number] = known

    def kind(self, number: int) -> str:
        born, _ = self.born[number]
        return self.kinds.get(number) or ("activations" if born.phase in ("forward", "backward") else "other")

    def peaks(self) -> dict[str, Peak]:
        """The peak of each phase of the whole step, what was alive at its start included."""
        peaks = {phase: Peak() for phase in PHASES}
        by_kind: Counter[str] = Counter()
        by_line: Counter[str] = Counter()
        total = 0
        changes = [(change[2], change) for change in self.changes]
        for number, change, moment in self.representatives.expand(changes) if self.representatives else self.changes:
            kind, change = self.kind(number), change * self._multiplicity(number, moment)
            by_kind[kind] += change
            if kind == "activations":
                by_line[self.born[number][1] or "smaller ones"] += change
            total += change
            if total > peaks[moment.phase].bytes:
                peaks[moment.phase] = Peak(total, by_kind.copy(), by_line.copy())
        return peaks

    def _multiplicity(self, number: int, moment: Moment) -> int:
        """How many changes this one represents where `expand` does not repeat it.

        That is so before the step, and where what each block left is freed outside of the blocks.
        """
        if moment.phase == PHASES[0]:
            return self.claims[number] or 1
        born, _ = self.born[number]
        is_outside = born.kind and not moment.kind
        return self.representatives.blocks_like(born) if self.representatives and is_outside else 1

    def check(self) -> None:
        """Raises NotAlikeError."""
        seen: dict[Moment, list[tuple[str, str, int]]] = defaultdict(list)
        for number, change, moment in self.changes:
            kind = self.kind(number)
            seen[moment].append((kind, self.born[number][1] if kind == "activations" else "", change))
        if self.representatives:
            self.representatives.check(seen)
