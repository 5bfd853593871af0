"""Which tokens a chunk has, made on the host from cu_seqlens without a sync, and taken to the device in one copy."""

import torch
from torch import Tensor


def chunk_tables(cu_seqlens: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cu_seqlens [S+1] on the host -> chunks [N, 4], sequences [S+1, 2], int32.

    Of a chunk: its first token, how many it has, how many of its sequence come before it, and after it. Of a sequence: its
    first token and its first chunk; the last row holds the ends.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    counts = (lengths + size - 1) // size  # [S], of chunks
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    inside = (torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(counts)) * size  # [N]
    first = starts.repeat_interleave(counts) + inside
    left = lengths.repeat_interleave(counts) - inside
    count = left.clamp(max=size)
    chunks = torch.stack([first, count, inside, left - count], dim=1)
    sequences = torch.stack([cu_seqlens.long(), bounds], dim=1)
    both = torch.cat([chunks.flatten(), sequences.flatten()]).to(torch.int32).to(device, non_blocking=True)
    return both[: chunks.numel()].view(chunks.shape), both[chunks.numel() :].view(sequences.shape)
