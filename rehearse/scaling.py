"""What one step sends as the cluster grows, beside the least that sharded training can do with."""

import torch

from qwen35.settings import Settings
from rehearse.batches import Mix, make_batch
from rehearse.configs import with_config
from rehearse.step import Rehearsal, rehearse

SIZES = (16, 64, 256, 1024)


def scaling(settings: Settings, mix: Mix, per_node: int, device: torch.device) -> int:
    """Print the table, as Markdown. Raises SettingError."""
    settings, config, source = with_config(settings)
    print(f"{source}; {mix.describe(settings)}; sent by a rank in a step")
    print("| NPUs | what | GB | least, GB | ratio | between nodes, GB | calls | messages, ring | messages, by nodes |")
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
        least = r.least.get((kind, group.name))
        ring = (group.size - 1) * traffic.calls * (2 if kind == "all-reduce" else 1)
        here = group.size // group.nodes
        nodes = (group.nodes - 1 + here - 1) * traffic.calls * (2 if kind == "all-reduce" else 1)
        bound = f"{least / 1e9:.2f} | {traffic.sent / least:.2f}" if least else " | "
        found.append(
            f"| {r.ranks:,} | {kind}, {group.name} ({group.size}) | {traffic.sent / 1e9:.2f} | {bound} | "
            f"{traffic.between / 1e9:.2f} | {traffic.calls:,} | {ring:,} | {nodes:,} |"
        )
    return found
