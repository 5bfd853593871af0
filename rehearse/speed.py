"""How long a step may take, between two ends.

The quick end: arithmetic, memory, wire and host all at once. The slow end: one after the other. rates.py has the rates of each.
"""

from dataclasses import dataclass

from rehearse.memory import PHASES
from rehearse.rates import Ends, Rates
from rehearse.step import Rehearsal


@dataclass(frozen=True)
class Times:
    """Seconds of one step, each as if it were alone."""

    arithmetic: float
    memory: float
    wire: float
    host: float

    @property
    def together(self) -> float:
        """All at once, but for arithmetic and memory, which take turns on one queue."""
        return max(self.arithmetic + self.memory, self.wire, self.host)

    @property
    def in_turn(self) -> float:
        return self.arithmetic + self.memory + self.wire + self.host


def times(r: Rehearsal, rates: Rates, again: float, hierarchical: bool) -> Times:
    """again: what recomputation adds to the model's FLOPs, 1/3 for a whole forward. Not hierarchical: a ring over all ranks."""
    wire = 0.0
    for (_, group), traffic in r.wire.traffic.items():
        if group.nodes == 1:
            wire += traffic.sent / rates.within
        elif hierarchical:
            wire += max(traffic.between / rates.between, (traffic.sent - traffic.between) / rates.within)
        else:
            wire += traffic.sent / rates.between
    operators = sum(r.operators.records[phase].host for phase in PHASES[1:])
    moved = sum(r.operators.records[phase].moved for phase in PHASES[1:])
    return Times(r.flops * (1 + again) / rates.flops, moved / rates.memory, wire, operators * rates.host)


def step_range(r: Rehearsal, again: float, ends: Ends) -> tuple[Times, Times]:
    return times(r, ends.quick, again, hierarchical=True), times(r, ends.slow, again, hierarchical=False)
