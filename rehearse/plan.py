"""Which layouts of a recipe are fastest and fit, by predicted seconds: `python -m rehearse.plan`.

Layouts are degrees of sharding, expert parallelism and Ulysses, how a step's tokens are cut into
micro-batches, and what is recomputed, offloaded or kept on the host. All train the same: as many
tokens a step as the recipe. Each way to keep activations is rehearsed once; from these figures all
layouts are estimated by arithmetic, and the best are rehearsed. Run by scripts/plan.sh.
"""

import hashlib
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from math import sqrt
from pathlib import Path

import torch
from tqdm import tqdm

from kernels import KernelError
from qwen35.checkpoint.folders import write_atomic
from qwen35.config.layout import check_layout
from qwen35.config.load import load_settings, parse_words, to_yaml
from qwen35.config.schema import Settings
from qwen35.errors import USER_ERRORS, Parser, SettingError, complain, one_line, whole_number
from qwen35.model import ModelConfig
from qwen35.wording import number_of
from rehearse import report
from rehearse.__main__ import DEVICE, add_options, hccl_megabytes
from rehearse.batches import Mix, make_batch
from rehearse.configs import with_config
from rehearse.estimate import Figures, Sizes, estimate
from rehearse.layouts import Layout, Recompute, layouts
from rehearse.operators import RehearsalError
from rehearse.rates import RateRange, read_rates
from rehearse.step import rehearse
from rehearse.step_time import best_and_worst
from rehearse.workers import count, workers

CACHE = Path("build/plan")
SHOWN = 6  # layouts in the table
MOST = 20  # rehearsals
MARGIN = 1.03  # estimates of memory may be so much too high
ALIKE = 1.01  # what differs by less is no difference, as far as the rates are known
RESERVE = 0.05  # of an NPU's memory, for its fragmentation, which no rehearsal counts


def measure(settings: Settings, mix: Mix, world: int, per_node: int, rates: RateRange) -> Figures | str:
    """The rehearsal's figures, from the cache if the same was rehearsed before; or why it fails."""
    settings, config, _ = with_config(settings)
    path = CACHE / f"{_digest(settings, config, mix, world, per_node, rates)}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, str) else Figures.read(found)
    try:
        batches = [make_batch(settings, config, mix)] * settings.training.gradient_accumulation_steps
        r = rehearse(settings, config, batches, world, per_node, torch.device(DEVICE))
        if wrong := r.operators.wrong:
            raise RehearsalError(wrong[0])
    except (RehearsalError, SettingError) as error:
        result: Figures | str = one_line(error)
    else:
        best, worst = best_and_worst(r, rates)
        pinned = r.operators.peak_pinned * min(per_node, world)
        hccl = report.hccl_bytes(r, hccl_megabytes())
        kinds = dict(report.peak(r)[1].by_kind)
        result = Figures(report.total_bytes(r, hccl), kinds, pinned, best, worst)
    CACHE.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result if isinstance(result, str) else asdict(result)))
    return result


def _digest(settings: Settings, config: ModelConfig, mix: Mix, world: int, per_node: int, rates: RateRange) -> str:
    """Of all that a rehearsal depends on, its code too."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256(repr((to_yaml(settings), config, mix, world, per_node, rates, hccl_megabytes())).encode())
    for path in sorted(path for room in ("rehearse", "kernels", "qwen35") for path in (root / room).rglob("*.py")):
        if path.name not in ("plan.py", "estimate.py", "layouts.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


class Plan:
    """Layouts of a recipe, and the figures of those that were rehearsed."""

    def __init__(self, settings: Settings, mix: Mix, args: Namespace, rates: RateRange):
        self.settings, config, self.source = with_config(settings)
        self.world, self.limit = args.nodes * args.npus_per_node, args.memory_gb * (1 - RESERVE) * report.GB
        own, basic = Layout.of(self.settings), self.settings.data.dataset_param.basic_parameters
        check_layout(self.settings, self.world)
        sequences = own.micro_batch * own.accumulation * self.world // own.ulysses
        self.tokens = args.tokens_per_step or sequences * basic.cutoff_len
        self.own = own if self.tokens == sequences * basic.cutoff_len else None
        self.layouts = list(layouts(self.settings, args.nodes, args.npus_per_node, self.tokens))
        if not self.layouts:
            raise SettingError(
                f"TOKENS_PER_STEP {self.tokens:,} is no multiple of what {self.world} NPUs take at a time, packed sequences "
                f"of cutoff_len = {basic.cutoff_len:,} tokens: {self.world * basic.cutoff_len:,}, or that over a Ulysses degree"
            )
        self.sizes = Sizes.of(self.settings, config, self.world, args.npus_per_node)
        self.figures: dict[Layout, Figures] = {}
        self.failed: dict[Layout, str] = {}
        self.measure = partial(measure, mix=mix, world=self.world, per_node=args.npus_per_node, rates=rates)
        self.rates = rates

    def rehearse(self, chosen: Iterable[Layout], pool: ProcessPoolExecutor, bar: tqdm) -> None:
        waiting = {layout: pool.submit(self.measure, layout.applied(self.settings)) for layout in dict.fromkeys(chosen)}
        for layout, future in waiting.items():
            found = future.result()
            if isinstance(found, str):
                self.failed[layout] = found
            else:
                self.figures[layout] = found
            bar.update()

    def search(self, pool: ProcessPoolExecutor, bar: tqdm) -> None:
        probes: dict[tuple[Recompute, bool], Layout] = {}
        for layout in sorted(
            self.layouts,
            key=lambda c: (c.shard is not None, c.ulysses, c.micro_batch, c.optimizer, self.sizes.seconds(c)),
        ):
            probes.setdefault(layout.mode, layout)
        self.rehearse([*probes.values(), *([self.own] if self.own else [])], pool, bar)
        probed = {mode: (layout, self.figures[layout]) for mode, layout in probes.items() if layout in self.figures}
        estimates = {c: estimate(c, *probed[c.mode], self.sizes, self.rates) for c in self.layouts if c.mode in probed}
        best_first = sorted(
            (c for c, e in estimates.items() if e.bytes <= self.limit * MARGIN),
            key=lambda c: (round(middle(estimates[c]), 1), estimates[c].bytes),
        )
        waiting = [c for c in best_first if c not in self.figures]
        while waiting and len(self.figures) + len(self.failed) < MOST:
            fitting = sorted(middle(f) for f in self.figures.values() if f.bytes <= self.limit)
            if len(fitting) >= SHOWN and fitting[SHOWN - 1] <= middle(estimates[waiting[0]]):
                break
            self.rehearse(waiting[: count()], pool, bar)
            del waiting[: count()]

    def lines(self) -> Iterator[str]:
        fitting = sorted(
            (c for c, f in self.figures.items() if f.bytes <= self.limit), key=lambda c: middle(self.figures[c])
        )
        alike = [c for c in fitting if middle(self.figures[c]) <= ALIKE * middle(self.figures[fitting[0]])]
        fitting = sorted(alike, key=lambda c: (c.expert, self.figures[c].bytes)) + fitting[len(alike) :]
        shown = fitting[:SHOWN]
        yield f"{'seconds a step':>16}{'GB an NPU':>11}{'host GB a node':>16}  layout: accumulation x micro-batch, …"
        for layout in [*shown, *([self.own] if self.own in self.figures and self.own not in shown else [])]:
            f = self.figures[layout]
            seconds = f"{f.best.overlapped:.2f} to {f.worst.serialized:.2f}"
            fits = "" if f.bytes <= self.limit else ": too much"
            mine = "  <- the recipe" if layout == self.own else ""
            yield f"{seconds:>16}{f.bytes / report.GB:>11.1f}{f.pinned / report.GB:>16.1f}  {layout}{fits}{mine}"
        if self.own in self.failed:
            yield f"the recipe's own layout: {self.failed[self.own]}"
        if not fitting:
            raise RehearsalError(
                f"none of {len(self.layouts):,} layouts fits into {self.limit / report.GB:.1f} GB: use more NODES, a smaller "
                "cutoff_len or adapters (training.lora)"
            )
        yield f"\nthe first, for the recipe:\n{fitting[0].yaml()}"


def middle(f: Figures) -> float:
    """Seconds a step, between both ends of the rates."""
    return sqrt(f.best.overlapped * f.worst.serialized)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="plan", description=__doc__)
    add_options(parser)
    parser.add_argument("--tokens-per-step", type=whole_number(1), help="default: as many as the recipe trains")
    args = parse_words(parser, argv)
    start = time.perf_counter()
    try:
        settings = load_settings(args.config, args.overrides)
        rates = read_rates(args.rates, torch.device(DEVICE).type) if args.rates else RateRange()
        plan = Plan(settings, Mix(args.sequence, args.images, args.trained), args, rates)
        with workers() as pool, tqdm(desc="rehearsed", unit=" layouts", leave=False) as bar:
            plan.search(pool, bar)
        rehearsed = len(plan.figures) + len(plan.failed)
        print(
            f"{args.config} on {args.nodes} x {args.npus_per_node} NPUs of {args.memory_gb} GB, of which {RESERVE:.0%} are "
            f"spared, model {plan.source}: {plan.tokens:,} tokens a step, {number_of(len(plan.layouts), 'layout')}, "
            f"{rehearsed} rehearsed in {time.perf_counter() - start:.0f} s; {rates.source}"
        )
        for line in plan.lines():
            print(line)
    except (*USER_ERRORS, KernelError) as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
