"""What a run prints before its first step."""

import torch
import torch.distributed as dist
from torch import nn

from qwen35.config.schema import Settings
from qwen35.device import HOST, describe
from qwen35.training.adamw import local
from qwen35.training.resume import sequences_per_step
from qwen35.wording import number_of


def opening(settings: Settings, device: torch.device, layout: object, model: nn.Module, before: str, after: str) -> str:
    """The machine, the arithmetic, and the tables of what is trained, before and after sharding."""
    t, recompute = settings.training, settings.parallel.recompute
    how: str = recompute if isinstance(recompute, str) else "on" if recompute else "off"
    if settings.parallel.activation_offload:
        how += ", what layers keep on the host" + " (here a copy that saves nothing)" * (device.type == HOST.type)
    kernels = f"kernels {settings.model.kernels or 'auto'} (see python -m kernels)"
    nbytes = sum(local(p).numel() * local(p).element_size() for p in model.parameters())
    return (
        f"{dist.get_world_size()} processes on {describe(device)}, torch {torch.__version__}: {layout}\n"
        f"arithmetic {t.dtype}, recompute {how}, {t.optimizer}, {kernels}\n"
        f"before sharding:\n{before}\nafter sharding ({nbytes:,} bytes on this rank):\n{after}"
    )


def coming_steps(settings: Settings, done: int) -> str:
    cutoff = settings.data.dataset_param.basic_parameters.cutoff_len
    bins = number_of(sequences_per_step(settings), "bin")
    return f"{bins} of {cutoff} tokens a step, steps {done + 1} to {settings.training.train_iters}"
