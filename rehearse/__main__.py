"""One whole step of a recipe as rank 0 of a virtual cluster of NPUs: memory, operators, collectives, and a range for its time.

Fails on an operator without a kernel for NPUs, on a host sync, on a peak over --memory-gb. No data and no weights are
needed: of the model its config.json, or where that is not there the published one of its size. Run by scripts/rehearse.sh.
"""

import json
import os
import sys
import time
from argparse import ArgumentTypeError, Namespace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from kernels import KernelError
from qwen35.config.load import load_settings
from qwen35.config.schema import Settings
from qwen35.errors import USER_ERRORS, Parser, complain, whole_number
from rehearse import report
from rehearse.batches import Mix, make_batch
from rehearse.configs import with_config
from rehearse.operators import RehearsalError
from rehearse.rates import Ends, read_rates
from rehearse.scaling import scaling
from rehearse.step import Rehearsal, rehearse

DEVICE = "npu:0"
HCCL_MEGABYTES = 200  # HCCL's own default of HCCL_BUFFSIZE


def share(text: str) -> float:
    """For argparse: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def factor(text: str) -> float:
    """For argparse: a number from 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1000:
        raise ArgumentTypeError(f"{text!r} is not a number from 1")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="rehearse", description=__doc__)
    number = whole_number(1)
    parser.add_argument("config", help="a recipe, e.g. configs/qwen3_5_4B.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    parser.add_argument("--nodes", type=number, default=1, help="machines")
    parser.add_argument("--npus-per-node", type=number, default=8)
    parser.add_argument("--memory-gb", type=number, default=64, help="of one NPU")
    parser.add_argument("--sequence", type=number, default=1024, help="tokens of each sequence in a bin")
    parser.add_argument("--images", type=share, default=0.25, help="share of the tokens that stand for images")
    parser.add_argument("--trained", type=share, default=0.4, help="share of the tokens that are trained")
    parser.add_argument("--imbalance", type=factor, default=1.0, help="rows for this rank's experts, over a fair share")
    parser.add_argument(
        "--rates", type=Path, metavar="FILE", help="rates that make accept has measured; default: stated ones"
    )
    parser.add_argument(
        "--json", action="store_true", help="a last line with the step's ends in seconds and its peak in bytes"
    )
    parser.add_argument(
        "--whole", action="store_true", help="every layer, not one for all that are alike: slower, as exact"
    )
    parser.add_argument("--scaling", action="store_true", help="only what is sent, on 16 to 1,024 NPUs")
    args = parser.parse_intermixed_args(argv)
    if find_spec("torch_npu") is None:
        parser.error("torch_npu is not to be seen; scripts/rehearse.sh brings it, with stand-ins for CANN")
    import_module("kernels.npu")  # and with it, torch has the device

    try:
        settings = load_settings(args.config, args.overrides)
        mix = Mix(args.sequence, args.images, args.trained)
        if args.scaling:
            return scaling(settings, mix, args.npus_per_node, torch.device(DEVICE))
        ends = read_rates(args.rates, torch.device(DEVICE).type) if args.rates else Ends()
        return one(args.config, settings, mix, args, ends)
    except (*USER_ERRORS, KernelError) as error:
        return complain(error)


def one(name: str, settings: Settings, mix: Mix, args: Namespace, ends: Ends) -> int:
    nodes, per_node = args.nodes, args.npus_per_node
    start = time.perf_counter()
    settings, config, source = with_config(settings)
    print(f"{name} on {nodes} x {per_node} NPUs, model {source}")
    t = settings.training
    print(f"{t.gradient_accumulation_steps} x {t.micro_batch_size} bins a rank and step; {mix.describe(settings)}")
    if settings.parallel.expert_parallel_size > 1:
        share = "every expert is chosen equally often"
        print(
            f"{share if args.imbalance == 1 else f'the experts of rank 0 get {args.imbalance} times their fair share'}"
        )
    batch = make_batch(settings, config, mix)
    batches = [batch] * t.gradient_accumulation_steps
    r = rehearse(
        settings, config, batches, nodes * per_node, per_node, torch.device(DEVICE), args.imbalance, args.whole
    )
    buffers = report.hccl_bytes(r, int(os.environ.get("HCCL_BUFFSIZE") or HCCL_MEGABYTES))
    again = 1 / 3 if settings.parallel.recompute else 0.0
    for line in report.lines(r, again, buffers, ends):
        print(line)
    check(r, buffers, args.memory_gb)
    print(f"rehearsed in {time.perf_counter() - start:.0f} s: it fits, waits for nothing and lacks no kernel")
    if args.json:
        print(json.dumps(report.summary(r, again, ends)))
    return 0


def check(r: Rehearsal, buffers: int, memory_gb: int) -> None:
    """Raises RehearsalError."""
    if wrong := r.operators.wrong:
        raise RehearsalError(f"{wrong[0]}{f', and {len(wrong) - 1} more' * (len(wrong) > 1)}")
    phase, peak = report.peak(r)
    buffers += r.operators.workspace
    if peak.bytes + buffers > memory_gb * report.GB:
        most = max(peak.of, key=lambda kind: peak.of[kind])
        raise RehearsalError(
            f"{(peak.bytes + buffers) / report.GB:.1f} GB in {phase}, and an NPU has NPU_MEMORY_GB={memory_gb}; most of it is "
            f"{most}, {peak.of[most] / report.GB:.1f} GB: more NODES, a smaller training.micro_batch_size, parallel.recompute"
        )


if __name__ == "__main__":
    sys.exit(main())
