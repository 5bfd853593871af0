"""The primitives in plain torch that the algorithms beside this file are written over."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.features import HAS_GROUPED_MM


def working_dtype(x: Tensor) -> torch.dtype:
    """fp32 for half precision; fp64 stays, for gradcheck."""
    return torch.promote_types(x.dtype, torch.float32)


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of expert e times its matrix: x [N, A] sorted by expert, weight [E, A, B], offsets [E] int32 ends of the groups.

    Returns [N, B]. An expert may have no rows.
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in (x.shape[1], weight.shape[2]))
    if HAS_GROUPED_MM and x.shape[0] > 0 and x.dtype != torch.float64 and aligned:
        return F.grouped_mm(x, weight, offs=offsets)
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return torch.cat([rows @ w for rows, w in zip(x.split(sizes), weight, strict=True)])
