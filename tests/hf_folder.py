"""Model folders as others write them, made without the code that reads and exports them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen35.checkpoint.hf_names import published_dtype

LAYOUTS = ("hub", "per_expert", "stacked")


def stored(state: Mapping[str, torch.Tensor], layout: str = "hub") -> dict[str, torch.Tensor]:
    """A model's tensors by their names on disk.

    Routed experts are stacked, or a tensor for each, as transformers saves them; on the hub the
    main ones are stacked, and those of `mtp.` are not.
    """
    found = {}
    for name, tensor in state.items():
        block, _, stack = name.rpartition(".experts.")
        if not block or layout == "stacked" or (layout == "hub" and not name.startswith("mtp.")):
            found[name] = tensor
            continue
        parts = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}[stack]
        for j, expert in enumerate(tensor):
            for part, rows in zip(parts, expert.chunk(len(parts)), strict=True):
                found[f"{block}.experts.{j}.{part}.weight"] = rows
    return found


def stored_shapes(shapes: Mapping[str, tuple[int, ...]], layout: str = "hub") -> dict[str, tuple[int, ...]]:
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(tensor.shape) for name, tensor in stored(state, layout).items()}


def write_hf(
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    folder: Path,
    layout: str = "hub",
    shard_size: int = 2**32,
    dtype_of: Callable[[str], torch.dtype] = published_dtype,
) -> None:
    """Weights, index and config. A file holds up to `shard_size` bytes, or one larger tensor."""
    tensors = {n: t.detach().to("cpu", dtype_of(n)).contiguous() for n, t in stored(state, layout).items()}
    shards: list[dict[str, torch.Tensor]] = []
    room = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        if tensors[name].nbytes > room:
            shards.append({})
            room = shard_size
        shards[-1][name] = tensors[name]
        room -= tensors[name].nbytes
    folder.mkdir(parents=True, exist_ok=True)
    file_of = {}
    for number, shard in enumerate(shards, 1):
        file = f"model.safetensors-{number:05}-of-{len(shards):05}.safetensors"
        file_of |= dict.fromkeys(shard, file)
        save_file(shard, folder / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    for name, content in (("model.safetensors.index.json", index), ("config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
