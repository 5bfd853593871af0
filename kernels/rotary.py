"""Rotary position embedding on the first R of D dimensions of a head, the two halves of R paired (not neighbours).

(a, b) -> (a cos - b sin, b cos + a sin), in fp32. Source: Su et al. 2021, arXiv:2104.09864.
"""

import torch
from torch import Tensor


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hk, D]; cos, sin [T, R/2] fp32, the same angles for both halves -> rotated q, k."""
    return _rotate(q, cos[:, None], sin[:, None]), _rotate(k, cos[:, None], sin[:, None])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    a, b = a.to(cos.dtype), b.to(cos.dtype)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)
