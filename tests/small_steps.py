"""What tests of training steps have in common: settings, packed sequences, weights and a Run."""

from typing import Any

import torch
from peer import PATCH_VALUES, config_dict
from torch.distributed.tensor import distribute_tensor

from qwen35.batch import PackedBatch
from qwen35.config.schema import (
    BasicParameters,
    DatasetParam,
    DataSettings,
    ModelSettings,
    ParallelSettings,
    Settings,
    TrainingSettings,
)
from qwen35.data.collator import collate
from qwen35.data.dataset import Sample
from qwen35.device import HOST
from qwen35.model import Qwen35, load_config
from qwen35.parallel.mesh import Meshes
from qwen35.train import Run
from qwen35.training.adamw import AdamW
from qwen35.training.optimizer import GradientNorm, make_optimizer

BIN, BUCKET = 64, 32


def settings_of(model: dict | None = None, parallel: dict | None = None, **training: Any) -> Settings:
    """Of a run that gets its model and its data from the test."""
    data, t = DataSettings(DatasetParam(BasicParameters("x"))), TrainingSettings(**{"save": "x"} | training)
    return Settings(data, ModelSettings("x", **model or {}), t, ParallelSettings(**parallel or {}))


def collated(*sequences: PackedBatch) -> PackedBatch:
    """A packed sequence as the collator makes it, with pad tail; only padding without any."""
    samples = [Sample(s.input_ids, s.labels, s.position_ids, s.pixel_values, s.grid_thw) for s in sequences]
    return collate([samples], BIN, 0, BUCKET, load_config(config_dict()).vision_spec, PATCH_VALUES)


def run_of(model: Qwen35, settings: Settings, meshes: Meshes, optimizer: AdamW | None = None) -> Run:
    norm = GradientNorm(model, meshes.weights["shard"].get_group())
    return Run(
        settings, HOST, meshes, model, optimizer or make_optimizer(model, settings.training), norm, iter([]), 0, {}
    )


def fill_from(model: Qwen35, whole: Qwen35) -> None:
    """Give a sharded model, still without values, those of a plain one."""
    model.to_empty(device=HOST)
    with torch.no_grad():
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            q = q.detach()
            p.copy_(distribute_tensor(q, p.device_mesh, p.placements) if hasattr(p, "placements") else q)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, or of a plain one, as a copy."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
