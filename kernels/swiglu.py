"""SwiGLU: silu(gate) * up over the two halves of the last dimension, computed in fp32.

Source: Shazeer 2020, arXiv:2002.05202.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import native


def swiglu(x: Tensor, primitives: ModuleType = native) -> Tensor:
    """x [..., 2I], gate first -> [..., I]. Saves only x for backward."""
    return _SwiGLU.apply(x.flatten(0, -2), primitives).unflatten(0, x.shape[:-1])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: ModuleType) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ops = ops
        return ops.swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ops.swiglu_backward(grad, *ctx.saved_tensors), None
