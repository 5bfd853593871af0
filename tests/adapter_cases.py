"""LoRA runs' checkpoints for tests, without a run."""

from pathlib import Path

import torch

from qwen35.checkpoint.dcp import write_shards
from qwen35.checkpoint.dcp_source import MODEL
from qwen35.checkpoint.dcp_write import local_shards
from qwen35.checkpoint.hf_names import pair_of, shapes_of
from qwen35.checkpoint.merged import AdapterRun, digest, open_base
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import LoraSpec

SPEC = LoraSpec(8, 16.0, ("q_proj", "out_proj"), ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), (), 4, False)
ADAPTED = ("q_proj.weight", "out_proj.weight", "experts.gate_up_proj", "experts.down_proj")


def model_in(folder: Path) -> Qwen35:
    with torch.device("meta"):
        return Qwen35(load_config(folder))


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    return shapes_of(model_in(folder).named_parameters())


def adapters(shapes: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, (*stack, rows, columns) in ((n, s) for n, s in shapes.items() if n.endswith(ADAPTED)):
        r = SPEC.expert_r if stack else SPEC.r
        for adapter, size in zip(pair_of(name), ((*stack, r, columns), (*stack, rows, r)), strict=True):
            made[adapter] = torch.randn(size, generator=generator) * 0.2
    return made


def run_on(base: Path, save: Path, config: Path, step: int = 3) -> dict[str, torch.Tensor]:
    """The checkpoint of a LoRA run on a base, in `save`; returns its adapters."""
    shapes = shapes_in(config)
    made = adapters(shapes)
    run = AdapterRun(SPEC, str(base), digest(open_base(model_in(config), base), shapes))
    write_shards(save, step, local_shards({MODEL + name: t for name, t in made.items()}), run.to_extra())
    return made
