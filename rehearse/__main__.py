"""Rehearse one training step of a recipe as rank 0 of a virtual cluster of NPUs.

Prints memory, operators, collectives and a range for the time of the step. Fails on an operator
without an NPU kernel, a host sync, or a peak over --memory-gb. Needs no data and no weights, only
the model's config.json or the published one of its size. Run by scripts/rehearse.sh.
"""

import json
import os
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from kernels import KernelError
from qwen35.config.load import load_settings, parse_words
from qwen35.config.schema import Settings
from qwen35.errors import USER_ERRORS, Parser, complain, whole_number
from rehearse import report
from rehearse.batches import Mix, make_batch
from rehearse.configs import with_config
from rehearse.operators import RehearsalError
from rehearse.rates import RateRange, read_rates
from rehearse.scaling import scaling
from rehearse.step import Rehearsal, rehearse

DEVICE = "npu:0"
HCCL_MEGABYTES = 200  # HCCL's own default of HCCL_BUFFSIZE


def number(least: float, most: float) -> Callable[[str], float]:
    """For argparse: a number between two bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise ArgumentTypeError(f"{text!r} is not a number from {least} to {most:,}")
        return value

    return parse


def add_options(parser: Parser) -> None:
    """What the commands that rehearse have in common."""
    add, positive, share = parser.add_argument, whole_number(1), number(0, 1)
    add("--nodes", type=positive, default=1, help="default: 1")
    add("--npus-per-node", type=positive, default=8, help="default: 8")
    add("--memory-gb", type=positive, default=64, help="memory of one NPU; default: 64")
    add("--sequence", type=positive, default=1024, help="tokens of each sequence; default: 1024")
    add("--images", type=share, help="share of the tokens that are image tokens; default: 0.25, 0 if text-only")
    add("--trained", type=share, default=0.4, help="share of the tokens that have a loss; default: 0.4")
    add("--rates", type=Path, metavar="FILE", help="rates that make accept has measured; default: assumed ones")


def hccl_megabytes() -> int:
    return int(os.environ.get("HCCL_BUFFSIZE") or HCCL_MEGABYTES)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="rehearse", description=__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--imbalance", type=number(1, 1000), default=1.0, help="load of this rank's experts over the mean; default: 1")
    add("--json", action="store_true", help="add a last line: best and worst seconds of a step, bytes at the peak")
    add("--whole", action="store_true", help="run every layer, not a few for all that are alike: slower, same figures")
    add("--operators", action="store_true", help="add the bytes through an NPU's memory, by operator and line")
    add("--scaling", action="store_true", help="print only what is sent on 16 to 1,024 NPUs")
    args = parse_words(parser, argv)
    if find_spec("torch_npu") is None:
        parser.error("torch_npu is not installed; scripts/rehearse.sh brings it, with stand-ins for CANN")
    import_module("kernels.npu")  # and with it, torch has the device

    try:
        settings = load_settings(args.config, args.overrides)
        mix = Mix(args.sequence, args.images, args.trained)
        if args.scaling:
            return scaling(settings, mix, args.npus_per_node, DEVICE)
        rates = read_rates(args.rates, torch.device(DEVICE).type) if args.rates else RateRange()
        return print_rehearsal(settings, mix, args, rates)
    except (*USER_ERRORS, KernelError) as error:
        return complain(error)


def print_rehearsal(settings: Settings, mix: Mix, args: Namespace, rates: RateRange) -> int:
    start = time.perf_counter()
    settings, config, source = with_config(settings)
    t = settings.training
    batches = [make_batch(settings, config, mix)] * t.gradient_accumulation_steps
    world = args.nodes * args.npus_per_node
    device = torch.device(DEVICE)
    r = rehearse(settings, config, batches, world, args.npus_per_node, device, args.imbalance, args.whole)
    hccl = report.hccl_bytes(r, hccl_megabytes())
    print(report.verdict(r, hccl, rates, args.memory_gb, args.npus_per_node))
    print(f"{args.config} on {args.nodes} x {args.npus_per_node} NPUs, model {source}")
    count = f"{t.gradient_accumulation_steps} x {t.micro_batch_size}"
    print(f"{count} packed sequences per rank and step; {mix.describe(settings, config)}")
    if settings.parallel.expert_parallel_size > 1:
        load = f"the experts of rank 0 get {args.imbalance} times the mean"
        print("every expert is chosen equally often" if args.imbalance == 1 else load)
    for line in report.lines(r, hccl, rates):
        print(line)
    for line in report.bytes_by_operator(r) if args.operators else ():
        print(line)
    check(r, hccl, args.memory_gb, report.remedies(r, hccl, args.memory_gb, settings, config))
    print(
        f"rehearsed in {time.perf_counter() - start:.0f} s: it fits in memory, no host sync is unexpected, no kernel is missing"
    )
    if args.json:
        print(json.dumps(report.summary(r, rates)))
    return 0


def check(r: Rehearsal, hccl: int, memory_gb: int, remedies: str) -> None:
    """Raises RehearsalError."""
    if wrong := r.operators.wrong:
        raise RehearsalError(f"{wrong[0]}{f', and {len(wrong) - 1} more' * (len(wrong) > 1)}")
    if (total := report.total_bytes(r, hccl)) > memory_gb * report.GB:
        phase, peak = report.peak(r)
        kind = max(peak.by_kind, key=lambda kind: peak.by_kind[kind])
        raise RehearsalError(
            f"{total / report.GB:.1f} GB in {phase}, and an NPU has NPU_MEMORY_GB={memory_gb}; most of it is "
            f"{kind}, {peak.by_kind[kind] / report.GB:.1f} GB; {remedies}"
        )


if __name__ == "__main__":
    sys.exit(main())
