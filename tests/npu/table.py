"""What a decoder layer costs beside transformers', as Markdown.

A layer's cost is the difference between models with and without one more layer of its kind.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from steps import DEVICE, PEER_GROUPS_EXPERTS, Step, make_batch, our_step, peer_step, slice_config

TOKENS = 2048
BASE = ["linear_attention", "full_attention"]


@dataclass
class Layer:
    dispatched: tuple[int, int]  # forward, backward
    launched: tuple[int, int]  # dispatched operators without views
    saved: float  # bytes per token


def layers(step: Callable[[dict, int], Step], moe: bool, of_base: list[str] = BASE) -> dict[str, Layer]:
    base, found = step(slice_config(moe, of_base), TOKENS), {}
    for kind in BASE:
        more = step(slice_config(moe, sorted([*of_base, kind], reverse=True)), TOKENS)
        pairs = (more.forward, base.forward), (more.backward, base.backward)
        found[kind] = Layer(
            tuple(a.ops.total() - b.ops.total() for a, b in pairs),
            tuple(a.launched - b.launched for a, b in pairs),
            (more.saved - base.saved) / TOKENS,
        )
    return found


def measure() -> dict[tuple[bool, str], dict[str, Layer]]:
    """(mixture of experts, whose) -> the layers."""
    found = {}
    for moe in (True, False):
        found[moe, "ours"] = layers(lambda c, t: our_step(c, make_batch(c, t, True), saves=True), moe)
        if not moe or PEER_GROUPS_EXPERTS:
            found[moe, "transformers"] = layers(peer_step, moe, BASE[1:])  # its delta rule is a thousand operators
    return found


def lines(measured: dict[tuple[bool, str], dict[str, Layer]]) -> Iterable[str]:
    yield f"torch {torch.__version__}, torch_npu {version('torch_npu')}, fake {DEVICE}, bf16, T={TOKENS}, no recompute"
    yield "| layer | whose | operators, forward + backward | without views | bytes for backward, a token |"
    yield "| --- | --- | --- | --- | --- |"
    for moe in (True, False):
        for kind, name in (("linear_attention", "delta net"), ("full_attention", "attention")):
            for whose in ("ours", "transformers"):
                if (moe, whose) in measured:
                    layer = measured[moe, whose][kind]
                    counts = (" + ".join(map(str, n)) for n in (layer.dispatched, layer.launched))
                    yield f"| {name} + {'MoE' if moe else 'MLP'} | {whose} | {' | '.join(counts)} | {layer.saved:,.0f} |"


def publish(name: str, lines: Iterable[str]) -> None:
    """Leave a table for scripts/test-npu.sh, which prints them in the order of their names."""
    Path(os.environ["NPU_TABLES"], name).write_text("\n".join(lines) + "\n")
