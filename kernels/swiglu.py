"""SwiGLU: silu(gate) * up over the two halves of the last dimension. Source: Shazeer 2020, arXiv:2002.05202."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2I], gate first -> [..., I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
