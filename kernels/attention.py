"""Attention over packed sequences: softmax(scale q k^T) v inside each sequence, causal or not, grouped KV heads."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

Prepare = Callable[..., tuple[Tensor, Tensor]]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    prepare: Prepare | None = None,
    inputs: Sequence[Tensor] = (),
) -> Tensor:
    """q [T, Hq, D], k, v [T, Hkv, D], cu_seqlens [S+1] on the CPU -> o [T, Hq, D].

    `prepare(q, k, *inputs)` gives the q and k that meet, if they are to be normed and turned first: an implementation may
    make them again in backward, rather than keep them.

    Neighbours of one length run as one batch (the frames of a video, images of one size). Nothing is gathered: each run is a
    view of the tokens, and torch's fused attention keeps q, k, v, o and the log of each row's sum.
    """
    if prepare:
        q, k = prepare(q, k, *inputs)
    runs = [(length, len(list(same))) for length, same in groupby(n for n in cu_seqlens.diff().tolist() if n > 0)]
    if not runs:
        return torch.zeros_like(q)
    tokens = [length * count for length, count in runs]
    outs = []
    for (length, count), *parts in zip(runs, *(x.split(tokens) for x in (q, k, v)), strict=True):
        qs, ks, vs = (x.unflatten(0, (count, length)).transpose(1, 2) for x in parts)  # [n, H, length, D]
        out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale, enable_gqa=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
