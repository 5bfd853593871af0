"""Every op on the device against kernels/reference.py on the CPU in fp64, forward and the gradient of each input."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import kernels
from accept.task import Task, distance
from kernels import reference
from kernels.cases import SMALL, Case, make_cases
from qwen35.device import set_up_device

# Without an NPU the ops are within 2e-5 and 2e-2; in fp32 the rest is room for a device's own exp and rsqrt.
TOLERANCES = {
    torch.float32: (1e-4, "fp32: sums in another order, the device's own exp and rsqrt"),
    torch.bfloat16: (2e-2, "bf16: a few roundings of 2^-9 in a row"),
}


def check(task: Task) -> None:
    device = set_up_device()
    chosen = kernels.select(device.type)
    torch.manual_seed(0)
    for op, make in make_cases(SMALL).items():
        case = make()
        for dtype, tolerance in TOLERANCES.items():
            inputs = [x if i in case.wide else x.to(dtype) for i, x in enumerate(case.inputs)]
            found, gradients = run(case, getattr(chosen, op), [x.to(device) for x in inputs])
            exact, wanted = run(case, getattr(reference, op), [x.double() for x in inputs])
            errors = {"forward": distance(found, exact), "gradients": distance(gradients, wanted)}
            task.compare(f"{op}, {dtype}", errors, *tolerance)


def run(case: Case, op: Callable, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """-> outputs, gradients of the inputs for a fixed direction of the outputs, which every dtype has exactly"""
    leaves = [x.requires_grad_() for x in inputs]
    out: Any = case.call(op, leaves, lambda x: x.to(leaves[0].device))
    outputs = (out,) if isinstance(out, Tensor) else out
    directions = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16() for y in outputs]
    return outputs, torch.autograd.grad(outputs, leaves, [d.to(y) for d, y in zip(directions, outputs, strict=True)])
