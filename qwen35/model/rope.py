"""The angles of the rotary embeddings, fp32. Made from plain numbers in every step: there is no buffer to load or lose."""

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos, sin [T, R/2]


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """[dim/2] fp32: theta^(-2i/dim)."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def text_rope(position_ids: Tensor, dim: int, theta: float, section: tuple[int, int, int]) -> Rope:
    """Interleaved M-RoPE: frequency 3i+1 turns by height and 3i+2 by width up to their section's size, the rest by time.

    position_ids [3, T] -> cos, sin [T, dim/2]. Source: Qwen3-VL's interleaved M-RoPE, as transformers has it.
    """
    freq = torch.arange(dim // 2, device=position_ids.device)
    time, height, width = position_ids.float()[..., None]  # [T, 1] each
    by_height = (freq % 3 == 1) & (freq < 3 * section[1])
    by_width = (freq % 3 == 2) & (freq < 3 * section[2])
    position = torch.where(by_height, height, torch.where(by_width, width, time))  # [T, dim/2]
    angle = position * inverse_frequencies(dim, theta, position_ids.device)
    return angle.cos(), angle.sin()


def vision_rope(position: Tensor, head_dim: int, theta: float = 10000.0) -> Rope:
    """position [P, 2] (row, column) -> cos, sin [P, head_dim/2]: the first half turns by the row, the second by the column."""
    frequencies = inverse_frequencies(head_dim // 2, theta, position.device)
    angle = (position.float()[..., None] * frequencies).flatten(1)
    return angle.cos(), angle.sin()
