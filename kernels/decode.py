"""Decoding: one more token for each of S sequences, after the packed run over the prompts.

The maths of gated_delta_rule.py, causal_conv1d.py and attention.py for a single token. The caller
owns the caches of earlier tokens. Shared K and KV heads are not repeated in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.host import to_device
from kernels.native import working_dtype


def attention_step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """q [S, Hq, D]; k, v [S, L, Hkv, D]; lengths [S] int64 -> o [S, Hq, D].

    Sequence s attends to its first lengths[s] keys; the others may hold any finite numbers.
    """
    is_valid = torch.arange(k.shape[1], device=k.device) < lengths[:, None]  # [S, L]
    grouped_q = q.unflatten(1, (k.shape[2], -1))  # [S, Hkv, G, D]: a KV head's queries as G tokens
    # op-plugin takes masks [B, 1, Sq, Skv], and before release 26.1 does not broadcast them over Sq
    mask = is_valid[:, None, None].expand(-1, 1, grouped_q.shape[2], -1)
    out = F.scaled_dot_product_attention(grouped_q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.flatten(1, 2)


def last_inputs(x: Tensor, cu_seqlens: Tensor, count: int) -> Tensor:
    """x [T, C], cu_seqlens [S+1] on the CPU -> each sequence's last `count` rows [S, C, count].

    Sequences that are shorter are padded with zeros at the front.
    """
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    index = ends - count + torch.arange(count)  # [S, count]
    index = to_device(torch.where(index >= starts, index, x.shape[0]), x.device)
    return F.pad(x, (0, 0, 0, 1))[index].transpose(1, 2).contiguous()


def causal_conv1d_step(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """x [S, C], weight [C, K] -> y [S, C]. Shifts tail [S, C, K-1], earlier inputs, in place."""
    window = torch.cat([tail, x[..., None]], dim=-1)  # [S, C, K]
    tail.copy_(window[..., 1:])
    wide = working_dtype(x)
    return F.silu((window.to(wide) * weight.to(wide)).sum(-1)).to(x.dtype)


def gated_delta_rule_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """q, k [S, Hk, Dk] raw; v [S, Hv, Dv]; g, beta [S, Hv] -> o [S, Hv, Dv] in v's dtype.

    Updates state [S, Hv, Dk, Dv] fp32 in place.
    """
    heads, wide, dtype = k.shape[1], state.dtype, v.dtype
    q, k = (x.to(wide) for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    v, beta = (x.to(wide).unflatten(1, (heads, -1)) for x in (v, beta))  # [S, Hk, G, Dv], [S, Hk, G]
    decay = g.to(wide).exp().unflatten(1, (heads, -1))[..., None]  # [S, Hk, G, 1]
    grouped_state = state.unflatten(1, (heads, -1))  # [S, Hk, G, Dk, Dv]
    # read the state only once: q^T (decay S + k u^T) = decay q^T S + (q^T k) u^T
    k_state, q_state = (torch.stack([k, q], dim=-2)[:, :, None] @ grouped_state).unbind(-2)  # [S, Hk, G, Dv] each
    update = beta[..., None] * (v - decay * k_state)
    out = decay * q_state + (q * k).sum(-1)[:, :, None, None] * update
    grouped_state.mul_(decay[..., None]).addcmul_(k[:, :, None, :, None], update[..., None, :])
    return out.flatten(1, 2).to(dtype)
