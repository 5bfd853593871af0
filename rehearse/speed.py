"""How long a step may take: from stated rates of an NPU and its links, between two ends that are both unproved.

The quick end: every rate at its peak, and arithmetic, memory, wire and host all at once. The slow end: rates that were measured
by others or are assumed, and one after the other. Sources:
- arithmetic: CANN's platform file of Ascend 910B2C has 24 cube cores of 16 x 16 x 16 products at 1.8 GHz, that is 354 TFLOPS;
  a public measurement (the README of limulidae) reached 328 with one large matmul in bf16. Over a step 40% is assumed.
- memory: the same file has 32 bytes a cycle and core, 1.38 TB/s; the same measurement 0.64 TB/s for an elementwise operator.
- within a node: the same measurement has 149 GB/s for an all-gather of 8 NPUs, 72 for an all-reduce.
- between nodes: a port of 200 Gb/s an NPU, 25 GB/s; 60% of it assumed.
- host: from 3 to 15 microseconds an operator, assumed.
"""

from dataclasses import dataclass

from rehearse.memory import PHASES
from rehearse.step import Rehearsal


@dataclass(frozen=True)
class Rates:
    flops: float  # a second
    memory: float  # bytes a second
    within: float  # a node, bytes a second and NPU
    between: float  # nodes
    host: float  # seconds an operator


QUICK = Rates(354e12, 1.38e12, 149e9, 25e9, 3e-6)
SLOW = Rates(0.4 * 354e12, 0.64e12, 72e9, 0.6 * 25e9, 15e-6)


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


def step_range(r: Rehearsal, again: float) -> tuple[Times, Times]:
    return times(r, QUICK, again, hierarchical=True), times(r, SLOW, again, hierarchical=False)
