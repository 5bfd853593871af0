"""Rotary embeddings' cos and sin, in fp32, computed in every step: there are no buffers to load."""

import math

import torch
from torch import Tensor

from qwen35.model.config import Yarn

Rope = tuple[Tensor, Tensor]  # cos, sin [T, R/2]


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """[dim/2] fp32: theta^(-2i/dim)."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def yarn_frequencies(dim: int, theta: float, yarn: Yarn, device: torch.device) -> Tensor:
    """[dim/2] fp32: fast frequencies as they are, slow ones divided by the factor, a ramp between.

    Source: Peng et al. 2023, YaRN, arXiv:2309.00071, section 3.2.
    """

    def edge(turns: float) -> float:
        """The dimension that turns so often in the trained length."""
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = edge(yarn.beta_fast), edge(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    kept, period = 1 - ramp, theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    return 1.0 / (yarn.factor * period) * (1 - kept) + 1.0 / period * kept


def text_rope(
    position_ids: Tensor, dim: int, theta: float, section: tuple[int, int, int], yarn: Yarn | None = None
) -> Rope:
    """Interleaved M-RoPE: position_ids [3, T] (time, height, width) -> cos, sin [T, dim/2].

    Frequencies 3i+1 use the height and 3i+2 the width, up to the size of their section; all others
    use the time. Source: Qwen3-VL's interleaved M-RoPE as implemented in transformers.
    """
    freq = torch.arange(dim // 2, device=position_ids.device)
    time, height, width = position_ids.float()[..., None]  # [T, 1] each
    by_height = (freq % 3 == 1) & (freq < 3 * section[1])
    by_width = (freq % 3 == 2) & (freq < 3 * section[2])
    position = torch.where(by_height, height, torch.where(by_width, width, time))  # [T, dim/2]
    if yarn is None:
        angle = position * inverse_frequencies(dim, theta, position_ids.device)
        return angle.cos(), angle.sin()
    angle = position * yarn_frequencies(dim, theta, yarn, position_ids.device)
    return angle.cos() * yarn.attention_factor, angle.sin() * yarn.attention_factor


def vision_rope(position: Tensor, head_dim: int, theta: float = 10000.0) -> Rope:
    """position [P, 2] (row, column) -> cos, sin [P, head_dim/2]: half for rows, half for columns"""
    frequencies = inverse_frequencies(head_dim // 2, theta, position.device)
    angle = (position.float()[..., None] * frequencies).flatten(1)
    return angle.cos(), angle.sin()
