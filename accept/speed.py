"""How fast the device is beside what rehearse assumes: matmuls, memory, an operator's start, every op at the sizes of 4B."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

import kernels
from accept.task import Task
from bench.rows import in_turn
from kernels.cases import make_cases, sizes_of_4b
from qwen35.device import has_own_memory, set_up_device, synchronize
from rehearse.rates import SLOW

OPERATORS = 1000
# bound by memory: a fused one moves what goes in and out, once each
ELEMENTWISE = ("causal_conv1d", "rms_norm", "rms_norm_gated", "apply_rotary", "swiglu")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of several, each waited for, behind a first one that compiles and allocates."""

    def waited_for() -> None:
        call()
        synchronize([device])

    return in_turn([waited_for])[0]


def matmul_rate(device: torch.device, tokens: int) -> float:
    """FLOPs a second of the largest linear map of 4B, forward and backward in bf16."""
    x, w, y = (torch.ones(shape, device=device).bfloat16() for shape in ((tokens, 2560), (9216, 2560), (tokens, 9216)))
    return 6 * tokens * w.numel() / seconds(lambda: (x @ w.T, y @ w, y.T @ x), device)


def check(task: Task) -> None:
    device = set_up_device()
    torch.manual_seed(0)
    tokens, words = (4096, 248_320) if has_own_memory(device) else (64 if task.small else 256, 16_384)
    rate = matmul_rate(device, tokens)
    what, found = "bf16 matmuls of 4B, forward and backward", f"{rate / 1e12:.3g} TFLOPS"
    task.measure(device, what, found, rate / SLOW.flops, f"{SLOW.flops / 1e12:.0f} TFLOPS", "flops", rate)
    x, y, out = (torch.ones(tokens << 15, device=device, dtype=torch.bfloat16) for _ in range(3))
    rate = 3 * x.nbytes / seconds(lambda: torch.add(x, y, out=out), device)
    memory, found = f"{SLOW.memory / 1e9:.0f} GB/s", f"{rate / 1e9:.3g} GB/s"
    task.measure(device, f"adding {x.nbytes >> 20} MiB", found, rate / SLOW.memory, memory, "memory", rate)
    each = seconds(lambda: [x[:1].add_(1) for _ in range(OPERATORS)], device) / OPERATORS / 2  # a view and an addition
    host, found = f"{SLOW.host * 1e6:.0f} us", f"{each * 1e6:.2g} us"
    task.measure(device, "starting an operator", found, SLOW.host / each, host, "host", each)
    chosen, cases = kernels.select(device.type), make_cases(sizes_of_4b(tokens, words))
    for op in ELEMENTWISE if task.small else cases:
        alone, both, moved = time_op(cases[op](), getattr(chosen, op), device)
        what, found = f"{op}, {tokens:,} tokens of 4B", f"{alone * 1e3:.2f} ms, with backward {both * 1e3:.2f} ms"
        if op in ELEMENTWISE:
            rate = moved / alone
            task.measure(device, what, f"{found}, {rate / 1e9:.3g} GB/s", rate / SLOW.memory, memory)
        else:
            task.add(what, "told", f"{found}, {moved / 1e9:.2g} GB in and out")


def time_op(case: Any, op: Callable, device: torch.device) -> tuple[float, float, int]:
    """-> seconds forward, seconds with backward, bytes that go in and out forward"""
    inputs = [(x if i in case.wide else x.bfloat16()).to(device).requires_grad_() for i, x in enumerate(case.inputs)]
    to = cache(lambda x: x.to(device))

    def forward() -> Sequence[Tensor]:
        out: Any = case.call(op, inputs, to)
        return (out,) if isinstance(out, Tensor) else out

    directions = [torch.ones_like(y) for y in forward()]
    both = seconds(lambda: torch.autograd.grad(forward(), inputs, directions), device)
    with torch.no_grad():
        alone = seconds(forward, device)
    return alone, both, sum(x.nbytes for x in (*inputs, *directions))
