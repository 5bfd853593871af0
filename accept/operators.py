"""Every op on the device against kernels/reference.py on the CPU in fp64: outputs and gradients."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

import kernels
from accept.task import Task, errors_of
from kernels import reference
from kernels.cases import FEW, Case, make_cases
from qwen35.device import take_device

# On a CPU the ops are within 2e-5 and 2e-2; in fp32 the rest is for a device's own exp and rsqrt.
TOLERANCES = {
    torch.float32: (1e-4, "fp32: sums in another order, the device's own exp and rsqrt"),
    torch.bfloat16: (2e-2, "bf16: a few roundings of 2^-9 in a row"),
}


def check(task: Task) -> None:
    device = take_device()
    chosen = kernels.select(device.type)
    torch.manual_seed(0)
    for op, make in make_cases(FEW).items():
        case = make()
        for dtype, tolerance in TOLERANCES.items():
            inputs = inputs_in(case, dtype)
            ours = [x.to(device).requires_grad_() for x in inputs]
            exact = [x.double().requires_grad_() for x in inputs]
            calls = bind(case, getattr(chosen, op), ours), bind(case, getattr(reference, op), exact)
            task.compare(f"{op}, {dtype}", errors_of((calls[0](), ours), (calls[1](), exact)), *tolerance)


def inputs_in(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [(x if i in case.wide else x.to(dtype)).detach() for i, x in enumerate(case.inputs)]


def bind(case: Case, op: Callable, inputs: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """A call of op that returns its outputs; the other arguments are copied to the device once."""
    to = cache(lambda x: x.to(inputs[0].device))

    def call() -> Sequence[Tensor]:
        out = case.call(op, inputs, to)
        return (out,) if isinstance(out, Tensor) else out

    return call
