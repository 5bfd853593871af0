"""AdamW for a sharded model, the learning rate schedule, the global gradient norm."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen35.config.schema import TrainingSettings
from qwen35.training.adamw import AdamW, SwappedAdamW, local
from qwen35.training.parameter_groups import by_module, chosen_patterns, group_of


def make_optimizer(model: nn.Module, t: TrainingSettings) -> AdamW:
    """AdamW over the trained parameters; vectors (norms, biases, gates) have no weight decay.

    The vision tower has its own parameter groups ("visual": True), which skip steps without images;
    the others skip those without tokens. So has each pattern of lr_by_module.
    """
    chosen = chosen_patterns(model, t.lr_by_module)
    by_kind: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = chosen.get(name, ""), group_of(name).startswith("visual"), p.ndim > 1
            by_kind.setdefault(kind, []).append(p)
    groups = [
        {
            "params": parameters,
            "weight_decay": t.weight_decay if is_matrix else 0.0,
            "visual": visual,
            "pattern": pattern,
            "lr_factor": t.lr_by_module.get(pattern, 1.0),
        }
        for (pattern, visual, is_matrix), parameters in by_kind.items()
    ]
    options: dict[str, Any] = {"lr": t.lr, "betas": (t.adam_beta1, t.adam_beta2), "eps": t.adam_eps}
    return (SwappedAdamW if t.optimizer == "adamw_swap" else AdamW)(groups, **options)


def group_table(optimizer: AdamW, lr: float) -> str:
    """The optimizer's groups, with the peak of each one's learning rate, and its weight decay."""
    rows: dict[tuple[str, float, float], int] = {}
    for group in optimizer.param_groups:
        name = group["pattern"] or ("others" if any(g["pattern"] for g in optimizer.param_groups) else "all")
        key = name, lr * group["lr_factor"], group["weight_decay"]
        rows[key] = rows.get(key, 0) + sum(p.numel() for p in group["params"])
    width = max(16, *(len(name) for name, *_ in rows))
    lines = [f"{'learning rates':{width}}{'trained':>16}{'lr':>16}{'weight decay':>16}"]
    lines += [f"{name:{width}}{n:>16,}{rate:>16.3g}{decay:>16g}" for (name, rate, decay), n in rows.items()]
    return "\n".join(lines)


def learning_rate(step: int, t: TrainingSettings, steps: int) -> float:
    """For steps 0 to `steps` - 1: linear warm-up, then constant, linear or cosine to min_lr."""
    warmup = round(t.lr_warmup_ratio * steps)
    if step < warmup:
        return t.lr * (step + 1) / warmup
    if t.lr_decay_style == "constant":
        return t.lr
    done = (step - warmup) / max(1, steps - warmup)
    remaining = 1 - done if t.lr_decay_style == "linear" else (1 + math.cos(math.pi * done)) / 2
    return t.min_lr + (t.lr - t.min_lr) * remaining


def prepare_step(optimizer: AdamW, lr: float, tokens: int, images: int, step_counters: Tensor) -> None:
    """Tell each group its learning rate, and whether it skips the step.

    tokens, images: this rank's. step_counters [6]: sums over the ranks, on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
        # True on the device: no rank has tokens for this part, so it skips the step. None: no skip.
        place, own = (5, images) if group["visual"] else (3, tokens)
        group["skip"] = None if own else step_counters[place] == 0


class GradientNorm:
    """The gradient's norm over all ranks, total and per parameter group, without a host sync."""

    def __init__(self, model: nn.Module, shard_group: dist.ProcessGroup):
        self.groups = by_module((n, p) for n, p in model.named_parameters() if p.requires_grad)
        self.parameters = [p for parameters in self.groups.values() for p in parameters]
        self.shard_group = shard_group

    def squares(self) -> Tensor:
        """-> [G] fp32, the sum of squares of each group's gradient."""
        present = [(i, local(p.grad)) for i, p in enumerate(self.parameters) if p.grad is not None]
        present = [(i, grad) for i, grad in present if grad.numel()]
        found = dict(zip([i for i, _ in present], torch._foreach_norm([g for _, g in present]), strict=True))
        zero = torch.zeros((), device=self.parameters[0].device)
        # [2, P], sharded and replicated parameters; few operators, since adapters are many groups
        norms = [
            torch.stack(
                [found.get(i, zero) if isinstance(p, DTensor) == of else zero for i, p in enumerate(self.parameters)]
            )
            for of in (True, False)
        ]
        sizes = [len(parameters) for parameters in self.groups.values()]
        parts = torch.stack([torch.stack(torch._foreach_norm(row.split(sizes))).square() for row in norms])
        dist.all_reduce(parts[0], group=self.shard_group)
        return parts.sum(0)

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale the gradients in place so that their norm is at most `limit`."""
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(p.grad) for p in self.parameters if p.grad is not None], scale)
