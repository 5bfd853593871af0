"""The slow, obviously correct definition of every op, one token or sequence at a time, for tests.

Signatures as in each op's own file. Computes in the input's dtype: call these with fp32 or fp64.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from kernels.moe_lora import ExpertAdapters


def sequences(cu_seqlens: Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor) -> Tensor:
    group = v.shape[1] // k.shape[1]
    out = []
    for seq in sequences(cu_seqlens):
        state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])  # [Hv, Dk, Dv]
        for t in range(seq.start, seq.stop):
            q_t, k_t = (x[t] / torch.sqrt((x[t] ** 2).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
            q_t, k_t = (x.repeat_interleave(group, dim=0) for x in (q_t, k_t))  # [Hv, Dk]
            state = state * torch.exp(g[t])[:, None, None]
            recalled = torch.einsum("hkv,hk->hv", state, k_t)
            state = state + torch.einsum("hk,hv->hkv", k_t, beta[t][:, None] * (v[t] - recalled))
            out.append(torch.einsum("hkv,hk->hv", state, q_t) / math.sqrt(k.shape[2]))
    return torch.stack(out) if out else torch.zeros_like(v)


def causal_conv1d(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    width = weight.shape[1]
    out = []
    for seq in sequences(cu_seqlens):
        for t in range(seq.start, seq.stop):
            taps = [weight[:, width - 1 - j] * x[t - j] for j in range(width) if t - j >= seq.start]
            y = torch.stack(taps).sum(0)
            out.append(y * torch.sigmoid(y))
    return torch.stack(out) if out else torch.zeros_like(x)


def moe_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    adapters: ExpertAdapters | None = None,
) -> Tensor:
    """With adapters the weights are merged, under autograd."""
    if adapters and adapters.gate_up:
        a, b = adapters.gate_up
        gate_up_proj = gate_up_proj + adapters.scale * torch.einsum("eor,eri->eoi", b, a)
    if adapters and adapters.down:
        a, b = adapters.down
        down_proj = down_proj + adapters.scale * torch.einsum("eor,eri->eoi", b, a)
    out = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for expert, weight in zip(topk_ids[t].tolist(), topk_weights[t], strict=True):
            y = y + weight * (down_proj[expert] @ swiglu(gate_up_proj[expert] @ x[t]))
        out.append(y)
    return torch.stack(out) if out else torch.zeros_like(x)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    out = []
    for seq in sequences(cu_seqlens):
        keys, values = (x[seq].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[seq], keys) * scale
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        out.append(torch.einsum("hij,jhd->ihd", torch.softmax(scores, dim=-1), values))
    return torch.cat(out)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * (1 + weight)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * gate * torch.sigmoid(gate)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        x = x.clone()
        for i in range(half):
            a, b = x[..., i].clone(), x[..., half + i].clone()
            x[..., i] = a * cos[:, None, i] - b * sin[:, None, i]
            x[..., half + i] = b * cos[:, None, i] + a * sin[:, None, i]
        return x

    return rotate(q), rotate(k)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor]:
    losses = []
    for h, label in zip(hidden, labels.tolist(), strict=True):
        losses.append(h.new_zeros(()) if label == -100 else -torch.log_softmax(weight @ h, dim=0)[label])
    token_loss = torch.stack(losses) if losses else hidden.new_zeros(0)
    return (token_weights * token_loss).sum(), token_loss.detach()


def token_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_probs = torch.log_softmax(hidden @ weight.T, dim=-1)
    return log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, 0)
