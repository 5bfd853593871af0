"""How long a step may take, in two cases.

Best: peak rates, with computation, communication and host work fully overlapped. Worst: assumed
rates, with nothing overlapped. rates.py has the rates of each case.
"""

from dataclasses import dataclass

from rehearse.memory import PHASES
from rehearse.rates import RateRange, Rates
from rehearse.step import Rehearsal


@dataclass(frozen=True)
class Times:
    """Seconds of one step, each part as if it ran alone."""

    arithmetic: float
    memory: float
    communication: float
    copies: float  # to the host's memory and back
    host: float

    @property
    def overlapped(self) -> float:
        """Everything at the same time, but for arithmetic and memory, which share one queue."""
        return max(self.arithmetic + self.memory, self.communication, self.copies, self.host)

    @property
    def serialized(self) -> float:
        return self.arithmetic + self.memory + self.communication + self.copies + self.host


def times(r: Rehearsal, rates: Rates, hierarchical: bool) -> Times:
    """Collectives over several nodes run as one ring over all ranks, or if hierarchical as a ring
    within each node and one between nodes at the same time.
    """
    communication = 0.0
    for (_, group), traffic in r.communication.traffic.items():
        if group.nodes == 1:
            communication += traffic.sent / rates.within
        elif hierarchical:
            communication += max(traffic.between / rates.between, (traffic.sent - traffic.between) / rates.within)
        else:
            communication += traffic.sent / rates.between
    counts = [r.operators.by_phase[phase] for phase in PHASES[1:]]
    return Times(
        (r.flops + r.recomputed) / rates.flops,
        sum(c.bytes_moved for c in counts) / rates.memory,
        communication,
        2 * sum(c.bytes_copied for c in counts) / rates.copies,  # all that goes to the host comes back
        sum(c.dispatched for c in counts) * rates.host,
    )


def best_and_worst(r: Rehearsal, rates: RateRange) -> tuple[Times, Times]:
    return times(r, rates.best, hierarchical=True), times(r, rates.worst, hierarchical=False)
