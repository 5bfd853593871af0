"""The lines that a rehearsal prints."""

from collections import Counter
from collections.abc import Iterator

from qwen35.config.schema import Settings
from qwen35.model import ModelConfig
from rehearse.memory import KINDS, PHASES, Peak
from rehearse.rates import RateRange
from rehearse.step import Rehearsal
from rehearse.step_time import best_and_worst

GB = 1 << 30  # the memory of an NPU is counted so
LINES = 6  # the lines that made most of the activations
SMALLEST = 2000  # a line with less than this part of all bytes has no row of its own
STEP = PHASES[1:]  # set-up is not a part of the step
TRITON = ("delta_rule::", "causal_conv1d::", "rms_norm_gated::")  # operators that launch our Triton kernels


def peak(r: Rehearsal) -> tuple[str, Peak]:
    """The step's highest peak and its phase, without workspace and HCCL's buffers."""
    phase = max(STEP, key=lambda p: r.peaks[p].bytes)
    return phase, r.peaks[phase]


def total_bytes(r: Rehearsal, hccl: int) -> int:
    """What an NPU must hold at the step's highest peak. hccl: bytes of HCCL's buffers."""
    return peak(r)[1].bytes + hccl + r.operators.workspace


def verdict(r: Rehearsal, hccl: int, rates: RateRange, memory_gb: int, per_node: int) -> str:
    """Whether it fits, what is left, what the hosts must hold, and how long a step takes."""
    total, (best, worst) = total_bytes(r, hccl) / GB, best_and_worst(r, rates)
    room = f"fits, {memory_gb - total:.1f} GB to spare" if total <= memory_gb else "DOES NOT FIT"
    pinned = r.operators.peak_pinned * min(per_node, r.ranks) / GB
    return (
        f"{room}: {total:.1f} of {memory_gb} GB an NPU, {pinned:.1f} GB of page-locked memory a node, "
        f"{best.overlapped:.2f} to {worst.serialized:.2f} s a step"
    )


def remedies(r: Rehearsal, hccl: int, memory_gb: int, settings: Settings, config: ModelConfig) -> str:
    """What would make a step fit that does not: by arithmetic on its peak, so to be rehearsed."""
    t, p, text = settings.training, settings.parallel, config.text
    total, kinds, layers = total_bytes(r, hccl), peak(r)[1].by_kind, len(text.layer_types)
    tokens = t.micro_batch_size * settings.data.dataset_param.basic_parameters.cutoff_len // p.ulysses_parallel_size
    inputs, activations = layers * tokens * text.hidden_size * 2, kinds["activations"]  # inputs: of the layers, in bf16
    found = []
    if t.optimizer == "adamw":
        found.append(("training.optimizer=adamw_swap", total - kinds["optimizer"]))
    if p.recompute is not True:
        found.append(("parallel.recompute=true", total - max(0, activations - activations // layers - inputs)))
    if not p.activation_offload:
        kept = inputs if p.recompute is True else activations
        found.append(("parallel.activation_offload=true", total - kept * (layers - 2) // layers))
    if t.micro_batch_size > 1:
        found.append((f"training.micro_batch_size={t.micro_batch_size // 2}", total - activations // 2))
    if p.fully_shard_parallel_size is None:
        sharded = sum(kinds[kind] for kind in ("parameters", "optimizer", "gradients"))
        more = [(f"{times} times the NODES", total - sharded + sharded // times) for times in (2, 4, 8, 16)]
        found += [option for option in more if option[1] <= memory_gb * GB][:1]
    fitting = [f"{name} ({size / GB:.0f} GB)" for name, size in found if size <= memory_gb * GB]
    if not fitting:
        return "no setting alone is enough by arithmetic: make plan looks for layouts that are"
    return f"by arithmetic this is enough: {', or '.join(fitting)}; make plan compares layouts"


def lines(r: Rehearsal, hccl: int, rates: RateRange) -> Iterator[str]:
    """hccl: bytes of HCCL's buffers."""
    yield from _memory(r, hccl)
    yield from _operators(r)
    yield from _communication(r)
    yield from _time(r, rates)


def bytes_by_operator(r: Rehearsal) -> Iterator[str]:
    """What moves through an NPU's memory in a step, by operator and line, the most first."""
    phases = {phase: r.operators.by_phase[phase].moved for phase in STEP}
    total = sum(phases.values(), Counter())
    names = {name: sum(n for (other, _), n in total.items() if other == name) for name, _ in total}
    width = max(len(f"{name} {line}") for name, line in total) + 4

    def row(what: str, sizes: list[int]) -> str:
        return f"{what:{width}}" + "".join(f"{size / 1e9:11.1f}" for size in (*sizes, sum(sizes)))

    yield f"{'GB through memory, without matmuls':{width}}" + "".join(f"{name:>11}" for name in (*STEP, "step"))
    yield row("all", [moved.total() for moved in phases.values()])
    for name in sorted(names, key=names.__getitem__, reverse=True):
        yield row(name, [sum(n for (o, _), n in moved.items() if o == name) for moved in phases.values()])
        for (other, line), size in total.most_common():
            if other == name and size * SMALLEST >= total.total():
                yield row(f"  {line}", [moved[name, line] for moved in phases.values()])


def hccl_bytes(r: Rehearsal, megabytes: int) -> int:
    """Two buffers for each group of ranks that communicates, as CANN documents HCCL_BUFFSIZE."""
    return 2 * (megabytes << 20) * len({group for _, group in r.communication.traffic})


def _memory(r: Rehearsal, hccl: int) -> Iterator[str]:
    peaks, workspace = r.peaks, r.operators.workspace
    yield f"{'GB per NPU':12}" + "".join(f"{kind:>13}" for kind in (*KINDS, "workspace", "HCCL", "total"))
    for phase in STEP:
        kinds = [peaks[phase].by_kind[kind] for kind in KINDS]
        total = peaks[phase].bytes + hccl + workspace
        yield f"{phase:12}" + "".join(f"{size / GB:13.2f}" for size in (*kinds, workspace, hccl, total))
    if pinned := r.operators.peak_pinned:
        copied = ", ".join(f"{phase} {r.operators.by_phase[phase].bytes_copied / GB:.2f}" for phase in STEP)
        yield f"pinned host memory: {pinned / GB:.2f} GB per rank; GB copied to it: {copied}"
    phase, highest = peak(r)
    largest = highest.by_line.most_common(LINES)
    by_line = ", ".join(f"{line} {size / GB:.2f}" for line, size in largest if size >= GB / 100)
    yield f"activations at the peak, in {phase}, by the line that made them: {by_line}"


def _operators(r: Rehearsal) -> Iterator[str]:
    for phase in STEP:
        counts = r.operators.by_phase[phase]
        yield (
            f"operators in {phase}: {counts.ops.total():,}, launching {counts.launched:,} kernels; "
            f"{counts.syncs} host syncs{' (token counts per expert)' * bool(counts.syncs)}"
        )
    ops = sum((r.operators.by_phase[phase].ops for phase in STEP), Counter())
    if launches := sum(n for name, n in ops.items() if name.startswith(TRITON)):
        yield f"Triton kernels: {launches:,} launches a step; with torch_npu 2.7.1.post2 each drains the host's queue"


def _communication(r: Rehearsal) -> Iterator[str]:
    yield f"{'sent by rank 0':34}{'ranks':>7}{'nodes':>7}{'calls':>8}{'GB':>10}{'between nodes':>16}"
    for (kind, group), traffic in sorted(r.communication.traffic.items(), key=lambda item: -item[1].sent):
        yield (
            f"{kind + ', ' + group.name:34}{group.size:>7}{group.nodes:>7}{traffic.calls:>8,}"
            f"{traffic.sent / 1e9:>10.3f}{traffic.between / 1e9:>16.3f}"
        )


def summary(r: Rehearsal, rates: RateRange) -> dict[str, float]:
    """For make accept: seconds of a step, bytes of tensors and workspace at the peak."""
    best, worst = best_and_worst(r, rates)
    return {
        "best": best.overlapped,
        "worst": worst.serialized,
        "peak": total_bytes(r, 0),
    }


def _time(r: Rehearsal, rates: RateRange) -> Iterator[str]:
    best, worst = best_and_worst(r, rates)
    yield (
        f"{'seconds a step':14} {'arithmetic':>10}{'memory':>12}{'communication':>14}{'copies':>10}{'host':>10}    total"
    )
    for name, t, total, how, at in (
        ("best case", best, best.overlapped, "all overlapped", rates.best),
        ("worst case", worst, worst.serialized, "nothing overlapped", rates.worst),
    ):
        yield (
            f"{name:14} {t.arithmetic:>10.2f}{t.memory:>12.2f}{t.communication:>14.2f}{t.copies:>10.2f}"
            f"{t.host:>10.2f}    {total:.2f}, {how}, at {at.flops / 1e12:.0f} TFLOPS, {at.memory / 1e12:.2f} TB/s of memory, "
            f"{at.within / 1e9:.0f} GB/s within and {at.between / 1e9:.0f} GB/s between nodes, "
            f"{at.copies / 1e9:.0f} GB/s to the host, {at.host * 1e6:.0f} us per operator"
        )
    tokens = r.tokens * r.data_ranks
    yield (
        f"{tokens:,} tokens a step on {r.ranks} NPUs, {r.flops / 1e12:,.1f} model TFLOP per NPU: between "
        f"{best.overlapped:.2f} and {worst.serialized:.2f} s, {tokens / r.ranks / worst.serialized:,.0f} to "
        f"{tokens / r.ranks / best.overlapped:,.0f} tokens/s per NPU ({rates.source})"
    )
    if r.flops_unpacked > 1.1 * r.flops:
        yield (
            f"with one text in each packed sequence the arithmetic would take {r.flops_unpacked / r.flops:.1f} times as long: "
            "--sequence says how long yours are"
        )
