"""The gated delta rule over packed sequences, in chunks.

For each head, with state S [Dk, Dv] starting at zero in every sequence, l2-normed q, k and q scaled by Dk^-1/2:

    S <- exp(g_t) S;   S <- S + k_t beta_t (v_t - k_t^T S)^T;   o_t = S^T q_t

Inside a chunk of C tokens the updates condense into one unit-triangular system (the UT transform), so that only the chunks
of a sequence follow each other, and everything else is matmuls over all chunks at once.
Source: Yang, Kautz, Hatamizadeh 2024, Gated Delta Networks, arXiv:2412.06464.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.native import working_dtype

CHUNK = 64


@dataclass(frozen=True)
class ChunkLayout:
    """Chunks never cross a sequence. They are ordered by their number inside their sequence, and within that by falling
    length of the sequence: step i of the scan works on one slice of chunks and the leading states."""

    index: Tensor  # [N, C] token of each place; T (one past the end) where a chunk is not full
    place: Tensor  # [T] the place n * C + c of each token
    steps: tuple[int, ...]  # sequences that have an i-th chunk; their sum is N
    by_length: Tensor  # [S] the sequences by falling length: whose state each leading one is


def chunk_layout(cu_seqlens: Tensor, size: int = CHUNK) -> ChunkLayout:
    """cu_seqlens [S+1] on the CPU -> ChunkLayout on the CPU."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    total = int(cu_seqlens[-1])
    lengths, by_length = lengths.sort(descending=True, stable=True)
    starts = starts[by_length]
    chunks = (lengths + size - 1) // size  # [S], falling
    longest = int(chunks[0]) if len(chunks) else 0
    steps = tuple(int((chunks > i).sum()) for i in range(longest))
    number = torch.arange(longest).repeat_interleave(
        torch.tensor(steps, dtype=torch.long)
    )  # [N] chunk inside its sequence
    sequence = torch.cat([torch.arange(n) for n in steps]) if steps else number  # [N]
    offset = number[:, None] * size + torch.arange(size)  # [N, C] token inside its sequence
    index = torch.where(offset < lengths[sequence, None], starts[sequence, None] + offset, total)
    place = torch.empty(total + 1, dtype=torch.long)
    place[index.flatten()] = torch.arange(index.numel())
    return ChunkLayout(index, place[:total], steps, by_length)


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor) -> Tensor:
    """q, k [T, Hk, Dk] raw; v [T, Hv, Dv]; g, beta [T, Hv] (g <= 0, the log of the decay); cu_seqlens [S+1] on the CPU.

    Returns o [T, Hv, Dv] in v's dtype. K head h serves the Hv/Hk consecutive V heads from h*Hv/Hk. fp32 inside.
    """
    return _chunked(q, k, v, g, beta, cu_seqlens, None)


def chunk_gated_delta_rule_and_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and the state after each sequence's last token, [S, Hv, Dk, Dv] fp32; for generation, not differentiable."""
    shape = len(cu_seqlens) - 1, v.shape[1], k.shape[2], v.shape[2]
    state = torch.zeros(shape, dtype=working_dtype(v), device=v.device)
    return _chunked(q, k, v, g, beta, cu_seqlens, state), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, last_state: Tensor | None
) -> Tensor:
    """last_state [S, Hv, Dk, Dv], zeros: takes the states, if there is one."""
    if q.shape[0] == 0:
        return torch.zeros_like(v)
    layout = chunk_layout(cu_seqlens)
    index = layout.index.to(q.device, non_blocking=True)
    heads, group = k.shape[1], v.shape[1] // k.shape[1]
    wide, dtype = working_dtype(v), v.dtype

    def chunked(x: Tensor) -> Tensor:  # [T, …] -> [N, C, …]; the places of no token hold zeros, which change nothing
        return F.pad(x, (0, 0) * (x.ndim - 1) + (0, 1))[index].to(wide)

    q, k = (chunked(x).transpose(1, 2) for x in (q, k))  # [N, Hk, C, Dk]
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    v = chunked(v).unflatten(2, (heads, group)).permute(0, 2, 3, 1, 4)  # [N, Hk, G, C, Dv]
    g, beta = (chunked(x).unflatten(2, (heads, group)).permute(0, 2, 3, 1) for x in (g, beta))  # [N, Hk, G, C]

    cum = g.cumsum(-1)
    decay = (cum[..., :, None] - cum[..., None, :]).tril()  # the zeros above the diagonal are masked again after exp
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = torch.where(lower, decay.exp(), 0)  # [N, Hk, G, C, C]
    k_t = k.transpose(-1, -2)
    system = (k @ k_t)[:, :, None] * decay * beta[..., None]  # its diagonal is taken as one by the solver
    from_start = cum.exp()[..., None]
    right = torch.cat([v, k[:, :, None] * from_start], dim=-1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_v, read_k = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    inside = (q @ k_t)[:, :, None] * decay
    to_end = (cum[..., -1:] - cum).exp()[..., None]
    q_start, k_end = q[:, :, None] * from_start, (k[:, :, None] * to_end).transpose(-1, -2)
    whole = cum[..., -1].exp()[..., None, None]

    state = v.new_zeros(layout.steps[0], heads, group, k.shape[-1], v.shape[-1])
    outs, first = [], 0
    by_length = layout.by_length.to(q.device, non_blocking=True)
    for active, going_on in zip(layout.steps, (*layout.steps[1:], 0), strict=True):
        now, first = slice(first, first + active), first + active
        state = state[:active]
        value = new_v[now] - read_k[now] @ state
        outs.append(q_start[now] @ state + inside[now] @ value)
        state = state * whole[now] + k_end[now] @ value
        if last_state is not None and going_on < active:
            last_state[by_length[going_on:active]] = state[going_on:].detach().flatten(1, 2)
    out = torch.cat(outs).permute(0, 3, 1, 2, 4)  # [N, C, Hk, G, Dv]
    return out.flatten(2, 3).flatten(0, 1)[layout.place.to(q.device, non_blocking=True)].to(dtype)
