"""The row about adapters: ours against peft on transformers' model, and against full training.

Slice S of slice_s.py at T = 2048, with adapters of rank 16 on attention, delta net and routed
experts. peft gets what makes it fastest: adapters in the weights' dtype, grouped experts, fused
attention.
"""

import multiprocessing
import time
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
ROUNDS, STEPS = 2, 4
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


def step(name: str) -> Callable[[], float]:
    """One step, forward and backward, of `ours`, of `full` training or of `peft`."""
    batch = slice_s.packed((TOKENS,), 1.0)
    model, peer = slice_s.models(slice_s.VOCABULARY, name == "peft")
    if peer is not None:
        return partial(slice_s.peer_step, trained_by_peft(peer), batch)
    return partial(slice_s.step, trained(model) if name == "ours" else model, batch)


def row() -> slice_s.Result:
    """Each in processes of its own, by turns: the memory of one must not slow the others."""
    made: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("peft", "full", "ours")}
    for _ in range(ROUNDS):
        for name, measured in made.items():
            measured.append(in_own_process(name))
    seconds, peaks, losses = ({name: min(m[i] for m in measured) for name, measured in made.items()} for i in range(3))
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


def in_own_process(name: str) -> tuple[float, float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (name,))


def _measured(name: str) -> tuple[float, float, float]:
    """Seconds of the fastest step, GB that the steps take at most, and the loss."""
    torch.manual_seed(0)
    call, times = step(name), []
    for _ in range(STEPS):  # the first ones take memory from the system
        start = time.perf_counter()
        loss = call()
        times.append(time.perf_counter() - start)
    # getrusage would count what the parent had when it started this process
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return min(times), int(peak) * 1024 / 1e9, loss
