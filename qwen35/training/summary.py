"""What a run prints before its first step and after its last."""

import torch
import torch.distributed as dist
from torch import nn

from qwen35.config.schema import Settings
from qwen35.device import HOST, describe
from qwen35.errors import visible
from qwen35.training.adamw import local
from qwen35.training.resume import sequences_per_step
from qwen35.wording import number_of


def report(text: str) -> None:
    if dist.get_rank() == 0:
        print(visible(text, keep="\n\t"), flush=True)  # names of records and files may hold anything


def opening(settings: Settings, device: torch.device, layout: object, model: nn.Module, table: str) -> str:
    """The devices, the arithmetic, and the table of a sharded model's parameters."""
    t, recompute = settings.training, settings.parallel.recompute
    recomputed: str = recompute if isinstance(recompute, str) else "on" if recompute else "off"
    if settings.parallel.activation_offload:
        recomputed += ", activations offloaded to the host" + " (no saving on a CPU)" * (device.type == HOST.type)
    kernels = f"kernels {settings.model.kernels or 'auto'} (see python -m kernels)"
    nbytes = sum(local(p).numel() * local(p).element_size() for p in model.parameters())
    return (
        f"{dist.get_world_size()} processes on {describe(device)}, torch {torch.__version__}: {layout}\n"
        f"arithmetic {t.dtype}, recompute {recomputed}, {t.optimizer}, {kernels}\n"
        f"weights on this rank: {nbytes:,} bytes\n{table}"
    )


def coming_steps(settings: Settings, done: int) -> str:
    cutoff = settings.data.dataset_param.basic_parameters.cutoff_len
    sequences = number_of(sequences_per_step(settings), "packed sequence")
    return f"{sequences} of {cutoff} tokens per step, steps {done + 1} to {settings.training.train_iters}"


def closing(settings: Settings, step: int, saves: int, seconds: float) -> str:
    """saves: checkpoints between steps; seconds: for which training waited for them."""
    t, lines = settings.training, []
    if saves:
        lines.append(f"checkpoints between steps: {saves}; training waited {seconds:.2f} s for them in all")
    if step < t.train_iters:
        lines.append(f"stopped and saved after step {step} of {t.train_iters}; the same command goes on from there")
    else:
        lines.append(f"trained {step} steps; {t.save} holds the checkpoint, metrics.jsonl and loss.png")
    return "\n".join(lines)
