"""What a run prints before its first step and after its last."""

from pathlib import Path
from shlex import quote

import torch
import torch.distributed as dist
from torch import nn

from qwen35.config.schema import Settings, dataset_entries
from qwen35.device import HOST, describe
from qwen35.training.adamw import local
from qwen35.training.resume import sequences_per_step
from qwen35.wording import duration, number_of


def start_message(settings: Settings, device: torch.device, layout: object, model: nn.Module, table: str) -> str:
    """The devices, the arithmetic, and the table of a sharded model's parameters."""
    t, recompute = settings.training, settings.parallel.recompute
    recomputed: str = recompute if isinstance(recompute, str) else "on" if recompute else "off"
    if settings.parallel.activation_offload:
        recomputed += ", activations offloaded to the host" + " (no saving on a CPU)" * (device.type == HOST.type)
    kernels = f"kernels {settings.model.kernels or 'auto'} (see python -m kernels)"
    reference = "the base without adapters" if t.lora else "the weights that the run began with"
    pairs = f"pairs of answers: {t.dpo.loss}, beta {t.dpo.beta:g}, the reference is {reference}\n" * (t.stage == "dpo")
    nbytes = sum(local(p).numel() * local(p).element_size() for p in model.parameters())
    return (
        f"{dist.get_world_size()} processes on {describe(device)}, torch {torch.__version__}: {layout}\n"
        f"arithmetic {t.dtype}, recompute {recomputed}, {t.optimizer}, {kernels}\n"
        f"{pairs}weights on this rank: {nbytes:,} bytes\n{table}"
    )


def steps_message(settings: Settings, done: int, last: int, steps_per_epoch: float) -> str:
    cutoff = settings.data.dataset_param.basic_parameters.cutoff_len
    sequences = number_of(sequences_per_step(settings), "packed sequence")
    epochs = f"{last / steps_per_epoch:,.2f} epochs in all, {steps_per_epoch:,.1f} steps each"
    end = "; the last step of each takes what is left" if settings.training.train_epochs else ""
    return f"{sequences} of {cutoff} tokens per step, steps {done + 1} to {last}: {epochs}{end}"


def end_message(
    settings: Settings, steps: range, total: int, seconds: float, saves: int, waited: float, best: str = ""
) -> str:
    """What was done, how long it took, and what to do next.

    steps: those done now; total: those of the whole run; saves: number of checkpoints between
    steps, for which training waited so many seconds in all; best: a line on the best checkpoint.
    """
    t, lines, last = settings.training, [], steps.stop - 1
    if saves:
        lines.append(f"checkpoints between steps: {saves}; training waited {waited:.2f} s for them in all")
    if best:
        lines.append(best)
    if last < total:
        lines.append(f"stopped and saved after step {last} of {total}; the same command goes on from there")
        return "\n".join([*lines, f"{number_of(len(steps), 'step')} took {duration(seconds)}"])
    val = settings.data.val_dataset_param if t.stage == "sft" else None  # pairs are not asked
    folder, hf = quote(t.save), quote(settings.model.model_name_or_path)
    files = [entry.file for entry in dataset_entries(val.basic_parameters.dataset)] if val else ["FILE"]
    media, default = val.basic_parameters.dataset_dir if val else "", str(Path(files[0]).parent)
    where = f" ARGS={quote(f'--dataset_dir {quote(media)}')}" if val and media != default else ""
    lines += [
        f"trained steps {steps[0]} to {last} in {duration(seconds)}",
        f"{t.save} holds the checkpoint, report.html, metrics.jsonl and train.log; next:",
        f"  make export DCP={folder} HF={hf} OUT={quote(f'{t.save}/hf')}",
        f"  make evaluate MODEL={folder} DATA={quote(','.join(files))}{where}",
        f"  make generate MODEL={folder} PROMPT='…'",
    ]
    return "\n".join(lines)
