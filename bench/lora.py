"""The row about adapters: ours against peft on transformers' model, and against full training.

Slice S of slice_s.py at T = 2048, with adapters of rank 16 on attention, delta net and routed
experts. peft gets what makes it fastest: adapters in the weights' dtype, grouped experts, fused
attention.
"""

import copy
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from bench import slice_s
from qwen35.model import Qwen35
from qwen35.model.lora import LoraSpec, add_adapters

M = TypeVar("M", bound=nn.Module)
TOKENS = 2048
R, ALPHA = 16, 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def trained(model: Qwen35) -> Qwen35:
    """The model with random adapters."""
    add_adapters(model, LoraSpec(R, ALPHA, LINEARS, EXPERTS, (), R, False))
    return _fill(model)


def trained_by_peft(model: nn.Module) -> nn.Module:
    import peft

    asked = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(LINEARS), target_parameters=list(EXPERTS))
    return _fill(peft.get_peft_model(model, asked, autocast_adapter_dtype=False))


def _fill(model: M) -> M:
    for p in model.parameters():
        if p.requires_grad:
            p.data = (torch.randn(p.shape) * 0.02).to(slice_s.BF16)
    return model


def steps(names: list[str]) -> dict[str, Callable[[], float]]:
    """One step, forward and backward, of each of `ours`, `full` (training) and `peft`."""
    batch = slice_s.packed((TOKENS,), 1.0)
    model, peer = slice_s.models(slice_s.VOCABULARY, "peft" in names)
    made: dict[str, Callable[[], float]] = {}
    if peer is not None:
        made["peft"] = partial(slice_s.peer_step, trained_by_peft(peer), batch)
    if "full" in names:
        made["full"] = partial(slice_s.step, copy.deepcopy(model) if "ours" in names else model, batch)
    if "ours" in names:
        made["ours"] = partial(slice_s.step, trained(model), batch)
    return made


def row() -> slice_s.Result:
    peaks = {name: peak_gb(name) for name in ("peft", "full", "ours")}  # before this process takes memory, too
    made = steps([*peaks])
    losses: dict[str, float] = {}

    def timed(name: str) -> None:
        losses[name] = made[name]()

    seconds = dict(zip(made, slice_s.alternate([partial(timed, name) for name in made], rounds=2), strict=True))
    if max(losses.values()) > 1.02 * min(losses.values()):
        raise RuntimeError(f"they do not compute the same: losses {losses}")
    return {
        "ratio": seconds["peft"] / seconds["ours"],
        "ratio_full": seconds["full"] / seconds["ours"],
        "memory_ratio": peaks["ours"] / peaks["peft"],
        "memory_ratio_full": peaks["ours"] / peaks["full"],
        "tokens_per_second": TOKENS / seconds["ours"],
        **{f"{name}_gb": peak for name, peak in peaks.items()},
    }


def peak_gb(name: str) -> float:
    """The most memory that a step of one of them takes, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_gb, (name,))


def _peak_gb(name: str) -> float:
    torch.manual_seed(0)
    steps([name])[name]()
    # getrusage would count what the parent had when it started this process
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(peak) * 1024 / 1e9
