"""What a rehearsal prints."""

from collections import Counter
from collections.abc import Iterator

from rehearse.memory import KINDS, PHASES, Peak
from rehearse.rates import Ends
from rehearse.speed import step_range
from rehearse.step import Rehearsal

GB = 1 << 30  # the memory of an NPU is counted so
LINES = 6  # that made most of the activations
STEP = PHASES[1:]  # set-up is not a part of the step
TRITON = ("delta_rule::", "causal_conv1d::", "rms_norm_gated::")  # what launches a Triton kernel of ours


def peak(r: Rehearsal) -> tuple[str, Peak]:
    """The step's highest, and its phase; workspace and HCCL's buffers are not in it."""
    peaks = r.ledger.peaks()
    phase = max(STEP, key=lambda p: peaks[p].bytes)
    return phase, peaks[phase]


def lines(r: Rehearsal, again: float, hccl: int, ends: Ends) -> Iterator[str]:
    """hccl: bytes of its buffers, two for each group of ranks that speaks (as CANN documents HCCL_BUFFSIZE)."""
    yield from _memory(r, hccl)
    yield from _operators(r)
    yield from _wire(r)
    yield from _time(r, again, ends)


def hccl_bytes(r: Rehearsal, megabytes: int) -> int:
    return 2 * (megabytes << 20) * len({group for _, group in r.wire.traffic})


def _memory(r: Rehearsal, hccl: int) -> Iterator[str]:
    peaks, beside = r.ledger.peaks(), hccl + r.operators.workspace
    yield f"{'GB an NPU':12}" + "".join(f"{kind:>13}" for kind in (*KINDS, "workspace", "HCCL", "all"))
    for phase in STEP:
        of = [peaks[phase].of[kind] for kind in KINDS]
        yield f"{phase:12}" + "".join(
            f"{x / GB:13.2f}" for x in (*of, r.operators.workspace, hccl, peaks[phase].bytes + beside)
        )

    if locked := r.operators.most_locked:
        copied = ", ".join(f"{phase} {r.operators.records[phase].copied / GB:.2f}" for phase in STEP)
        yield f"page-locked memory of the host: {locked / GB:.2f} GB a rank; GB copied there: {copied}"
    phase, highest = peak(r)
    most = ", ".join(f"{place} {count / GB:.2f}" for place, count in highest.at.most_common(LINES) if count >= GB / 100)
    yield f"activations at the peak, in {phase}, by the line that made them: {most}"


def _operators(r: Rehearsal) -> Iterator[str]:
    for phase in STEP:
        record = r.operators.records[phase]
        yield (
            f"operators, {phase}: {record.ops.total():,}, which start {record.launched:,} kernels; "
            f"{record.syncs} host syncs{' (counts of rows by expert)' * bool(record.syncs)}"
        )
    of_step = sum((r.operators.records[phase].ops for phase in STEP), Counter())
    if launches := sum(n for name, n in of_step.items() if name.startswith(TRITON)):
        yield f"Triton kernels: {launches:,} launches a step, and with torch_npu 2.7.1.post2 as often the host drains its queue"


def _wire(r: Rehearsal) -> Iterator[str]:
    yield f"{'sent by rank 0':34}{'ranks':>7}{'nodes':>7}{'calls':>8}{'GB':>10}{'between nodes':>16}"
    for (kind, group), traffic in sorted(r.wire.traffic.items(), key=lambda item: -item[1].sent):
        yield (
            f"{kind + ', ' + group.name:34}{group.size:>7}{group.nodes:>7}{traffic.calls:>8,}"
            f"{traffic.sent / 1e9:>10.3f}{traffic.between / 1e9:>16.3f}"
        )


def summary(r: Rehearsal, again: float, ends: Ends) -> dict[str, float]:
    """What make accept sets beside what it measures: seconds a step, bytes of tensors and workspace at the peak."""
    quick, slow = step_range(r, again, ends)
    return {"quick": quick.together, "slow": slow.in_turn, "peak": peak(r)[1].bytes + r.operators.workspace}


def _time(r: Rehearsal, again: float, ends: Ends) -> Iterator[str]:
    quick, slow = step_range(r, again, ends)
    tokens = r.tokens * r.data_ranks
    yield f"{'seconds a step':12} {'arithmetic':>12}{'memory':>12}{'wire':>12}{'host':>12}{'':4}all"
    for name, t, rates, together in (("quick", quick, ends.quick, True), ("slow", slow, ends.slow, False)):
        whole = t.together if together else t.in_turn
        yield (
            f"{name:12}   {t.arithmetic:>12.2f}{t.memory:>12.2f}{t.wire:>12.2f}{t.host:>12.2f}    "
            f"{whole:.2f} {'at once' if together else 'in turn'}, at {rates.flops / 1e12:.0f} TFLOPS, "
            f"{rates.memory / 1e12:.2f} TB/s, {rates.within / 1e9:.0f} and {rates.between / 1e9:.0f} GB/s, "
            f"{rates.host * 1e6:.0f} us an operator"
        )
    yield (
        f"{tokens:,} tokens a step on {r.ranks} NPUs, {r.flops / 1e12:,.1f} TFLOP of the model an NPU: between "
        f"{quick.together:.2f} and {slow.in_turn:.2f} s, {tokens / r.ranks / slow.in_turn:,.0f} to "
        f"{tokens / r.ranks / quick.together:,.0f} tokens a second and NPU ({ends.source})"
    )
