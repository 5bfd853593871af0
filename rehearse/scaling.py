"""What one step sends as the cluster grows, beside the least that sharded training can do with."""

import torch

from qwen35.config.schema import Settings
from rehearse.batches import Mix, make_batch
from rehearse.configs import with_config
from rehearse.step import Rehearsal, rehearse

SIZES = (16, 64, 256, 1024)


def scaling(settings: Settings, mix: Mix, per_node: int, device: torch.device) -> int:
    """Print the table, as Markdown. Raises SettingError."""
    settings, config, source = with_config(settings)
    print(f"{source}; {mix.describe(settings)}; sent by a rank in a step")
    print("| NPUs | what | GB | least, GB | ratio | between nodes, GB | calls | messages, flat | messages, by nodes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    batches = [make_batch(settings, config, mix)] * settings.training.gradient_accumulation_steps
    for world in SIZES:
        if world >= per_node:
            for line in rows(rehearse(settings, config, batches, world, per_node, device)):
                print(line, flush=True)
    return 0


def rows(r: Rehearsal) -> list[str]:
    found = []
    for (kind, group), traffic in sorted(r.wire.traffic.items(), key=lambda item: -item[1].sent):
        if traffic.sent < 1e6 and traffic.calls < 4:
            continue  # the gradient norm, and the like
        least = sum(r.least.get((kind, name), 0.0) for name in group.name.split("+"))
        flat, by_nodes = messages(kind, group.size, group.nodes)
        bound = f"{least / 1e9:.2f} | {traffic.sent / least:.2f}" if least else " | "
        found.append(
            f"| {r.ranks:,} | {kind}, {group.name} ({group.size}) | {traffic.sent / 1e9:.2f} | {bound} | "
            f"{traffic.between / 1e9:.2f} | {traffic.calls:,} | {flat * traffic.calls:,} | {by_nodes * traffic.calls:,} |"
        )
    return found


def messages(kind: str, ranks: int, nodes: int) -> tuple[int, int]:
    """That a rank sends in one call: in a ring over all ranks; in a ring over the nodes and one within each of them.

    An all-to-all has a message for every other rank, however it is laid out.
    """
    if kind == "all-to-all":
        return ranks - 1, ranks - 1
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * (ranks - 1), rounds * (nodes - 1 + ranks // nodes - 1)
