"""What a decoder layer costs beside transformers', as Markdown: `python tests/npu/table.py`.

A layer's cost is the difference between models with and without one more layer of its kind.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path += [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "kernels"),
]  # for peer.py and test_kernels.py

import torch
from steps import DEVICE, Step, make_batch, our_step, peer_step, slice_config

from kernels.features import HAS_GROUPED_MM

TOKENS = 2048
BASE = ["linear_attention", "full_attention"]


@dataclass
class Layer:
    dispatched: tuple[int, int]  # forward, backward
    launched: tuple[int, int]  # dispatched operators without views
    saved: float  # bytes per token


def layers(step: Callable[[dict, int], Step], moe: bool) -> dict[str, Layer]:
    base, found = step(slice_config(moe, BASE), TOKENS), {}
    for kind in BASE:
        more = step(slice_config(moe, sorted([*BASE, kind], reverse=True)), TOKENS)
        pairs = (more.forward, base.forward), (more.backward, base.backward)
        found[kind] = Layer(
            tuple(a.ops.total() - b.ops.total() for a, b in pairs),
            tuple(a.launched - b.launched for a, b in pairs),
            (more.saved - base.saved) / TOKENS,
        )
    return found


def main() -> None:
    print(f"torch {torch.__version__}, torch_npu {version('torch_npu')}, fake {DEVICE}, bf16, T={TOKENS}, no recompute")
    print("| layer | whose | operators, forward + backward | without views | bytes for backward, a token |")
    print("| --- | --- | --- | --- | --- |")
    for moe in (True, False):
        columns = [("ours", layers(lambda c, t: our_step(c, make_batch(c, t, True)), moe))]
        if not moe or HAS_GROUPED_MM:  # else transformers syncs for each expert's rows
            columns.append(("transformers", layers(peer_step, moe)))
        for kind, name in (("linear_attention", "delta net"), ("full_attention", "attention")):
            for whose, found in columns:
                counts = (" + ".join(map(str, n)) for n in (found[kind].dispatched, found[kind].launched))
                print(
                    f"| {name} + {'MoE' if moe else 'MLP'} | {whose} | {' | '.join(counts)} | {found[kind].saved:,.0f} |"
                )


if __name__ == "__main__":
    main()
