"""Tables of the tokens of each chunk, made on the host and copied to the device without a sync."""

import numpy as np
import torch
from torch import Tensor

from kernels.host import computed_once, to_device


def chunk_tables(cu_seqlens: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cu_seqlens [S+1] on the host -> chunks [N, 4], sequences [S+1, 2], int32 on the device.

    A chunk of up to `size` tokens: its first token, its token count, and the numbers of tokens of
    its sequence before and after it. A sequence: its first token and first chunk; the last row: the
    ends.
    """
    return computed_once(cu_seqlens, ("chunks", size, device), lambda: _made(cu_seqlens, size, device))


def _made(cu_seqlens: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    bounds = np.array(cu_seqlens.tolist(), dtype=np.int64)
    lengths = np.diff(bounds)
    counts = -(-lengths // size)  # [S], of chunks
    chunk_bounds = np.concatenate([[0], counts.cumsum()])
    before = (np.arange(chunk_bounds[-1]) - chunk_bounds[:-1].repeat(counts)) * size  # [N]
    left = lengths.repeat(counts) - before
    count = left.clip(max=size)
    chunks = np.stack([bounds[:-1].repeat(counts) + before, count, before, left - count], axis=1)
    sequences = np.stack([bounds, chunk_bounds], axis=1)
    numbers = np.concatenate([chunks.ravel(), sequences.ravel()]).astype(np.int32)
    both = to_device(torch.from_numpy(numbers), device)
    return both[: chunks.size].view(-1, 4), both[chunks.size :].view(-1, 2)
