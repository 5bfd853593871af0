"""What a rank sends in a step as the cluster grows, beside the lower bound of sharded training."""

from functools import partial

import torch

from qwen35.config.schema import Settings
from rehearse.batches import Mix, make_batch
from rehearse.configs import with_config
from rehearse.step import Rehearsal, rehearse
from rehearse.workers import workers

SIZES = (16, 64, 256, 1024)
COLUMNS = (
    *("NPUs", "collective, group (ranks)", "GB", "lower bound, GB", "ratio", "GB between nodes", "calls"),
    *("messages, one ring", "messages, a ring per node and one between nodes"),
)


def scaling(settings: Settings, mix: Mix, per_node: int, device: str) -> int:
    """Print a Markdown table. Raises SettingError."""
    settings, config, source = with_config(settings)
    print(f"model {source}; {mix.describe(settings, config)}; sent by one rank in a step")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    worlds = [world for world in SIZES if world >= per_node]
    with workers() as pool:
        for found in pool.map(partial(_rows_of, settings, mix, per_node, device), worlds):
            print("\n".join(found), flush=True)
    return 0


def _rows_of(settings: Settings, mix: Mix, per_node: int, device: str, world: int) -> list[str]:
    config = with_config(settings)[1]
    batches = [make_batch(settings, config, mix)] * settings.training.gradient_accumulation_steps
    return rows(rehearse(settings, config, batches, world, per_node, torch.device(device)))


def rows(r: Rehearsal) -> list[str]:
    found = []
    for (kind, group), traffic in sorted(r.communication.traffic.items(), key=lambda item: -item[1].sent):
        if traffic.sent < 1e6 and traffic.calls < 4:
            continue  # the gradient norm and the like
        bound = sum(r.lower_bound.get((kind, name), 0.0) for name in group.name.split("+"))
        one_ring, by_node = messages(kind, group.size, group.nodes)
        ratio = f"{bound / 1e9:.2f} | {traffic.sent / bound:.2f}" if bound else " | "
        found.append(
            f"| {r.ranks:,} | {kind}, {group.name} ({group.size}) | {traffic.sent / 1e9:.2f} | {ratio} | "
            f"{traffic.between / 1e9:.2f} | {traffic.calls:,} | {one_ring * traffic.calls:,} | "
            f"{by_node * traffic.calls:,} |"
        )
    return found


def messages(kind: str, ranks: int, nodes: int) -> tuple[int, int]:
    """Messages of a rank in a call: in one ring; in a ring per node and one between nodes.

    An all-to-all has a message for every other rank either way.
    """
    if kind == "all-to-all":
        return ranks - 1, ranks - 1
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * (ranks - 1), rounds * (nodes - 1 + ranks // nodes - 1)
