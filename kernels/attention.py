"""Attention over packed sequences: softmax(scale q k^T) v inside each sequence, causal or not, grouped KV heads."""

from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
    """q [T, Hq, D], k, v [T, Hkv, D], cu_seqlens [S+1] on the CPU -> o [T, Hq, D].

    Sequences of one length run as one batch: images of one size, or many short samples, cost a call a length, not a call each.
    """
    bounds = cu_seqlens.tolist()
    starts_of = defaultdict(list)
    for start, end in pairwise(bounds):
        if end > start:
            starts_of[end - start].append(start)
    if not starts_of:
        return torch.zeros_like(q)
    rows, parts = [], []
    for length, starts in starts_of.items():
        index = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(q.device, non_blocking=True)
        rows.append(index)
        # [n, H, length, D]
        qs, ks, vs = (x[index].unflatten(0, (len(starts), length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale, enable_gqa=True)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    # every token is in exactly one sequence, so the inverse permutation puts the parts back in order
    order = torch.cat(rows)
    return torch.cat(parts)[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=q.device))]
