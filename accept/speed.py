"""The speed of matmuls, memory, launches and every op at the sizes of 4B, beside assumed rates."""

from collections.abc import Callable

import torch

import kernels
from accept.operators import bind, inputs_in
from accept.task import Task
from bench.rows import alternate
from kernels.cases import Case, make_cases, of_4b
from qwen35.device import is_apart, synchronize, take_device

OPERATORS = 1000
# bound by memory: a fused one reads its inputs and writes its outputs once
ELEMENTWISE = ("causal_conv1d", "rms_norm", "rms_norm_gated", "apply_rotary", "swiglu")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of several synchronized calls, after a first one that compiles and allocates."""

    def synchronized() -> None:
        call()
        synchronize([device])

    return alternate([synchronized])[0]


def matmul_rate(device: torch.device, tokens: int) -> float:
    """FLOP/s of the largest linear layer of 4B, forward and backward in bf16."""
    x, w, y = (torch.ones(shape, device=device).bfloat16() for shape in ((tokens, 2560), (9216, 2560), (tokens, 9216)))
    return 6 * tokens * w.numel() / seconds(lambda: (x @ w.T, y @ w, y.T @ x), device)


def check(task: Task) -> None:
    device = take_device()
    torch.manual_seed(0)
    tokens, words = (4096, 248_320) if is_apart(device) else (64 if task.small else 256, 16_384)
    task.add_rate(device, "bf16 matmuls of 4B, forward and backward", "flops", matmul_rate(device, tokens))
    x, y, out = (torch.ones(tokens << 15, device=device, dtype=torch.bfloat16) for _ in range(3))
    rate = 3 * x.nbytes / seconds(lambda: torch.add(x, y, out=out), device)
    task.add_rate(device, f"adding {x.nbytes >> 20} MiB", "memory", rate)
    both = seconds(lambda: [x[:1].add_(1) for _ in range(OPERATORS)], device) / OPERATORS  # a view and an addition
    task.add_rate(device, "launching an operator", "host", both / 2)
    chosen, cases = kernels.select(device.type), make_cases(of_4b(tokens, words))
    for op in ELEMENTWISE if task.small else cases:
        alone, both, moved = time_op(cases[op](), getattr(chosen, op), device)
        what, found = f"{op}, {tokens:,} tokens of 4B", f"{alone * 1e3:.2f} ms, with backward {both * 1e3:.2f} ms, "
        if op in ELEMENTWISE:
            task.add_rate(device, what, "memory", moved / alone, found, is_rate=False)
        else:
            task.add(what, "info", f"{found}{moved / 1e9:.2g} GB in and out")


def time_op(case: Case, op: Callable, device: torch.device) -> tuple[float, float, int]:
    """-> seconds of forward, of forward and backward, bytes of inputs and outputs"""
    inputs = [x.to(device).requires_grad_() for x in inputs_in(case, torch.bfloat16)]
    forward = bind(case, op, inputs)
    directions = [torch.ones_like(y) for y in forward()]
    both = seconds(lambda: torch.autograd.grad(forward(), inputs, directions), device)
    with torch.no_grad():
        alone = seconds(forward, device)
    return alone, both, sum(x.nbytes for x in (*inputs, *directions))
