"""The routed experts: y[t] = sum_k topk_weights[t, k] * down[e] swiglu(gate_up[e] x[t]), e = topk_ids[t, k].

Tokens are sorted by expert once, so that each projection is one grouped matmul; no loop over experts, no host sync.
"""

import torch
from torch import Tensor

from kernels.native import grouped_matmul
from kernels.swiglu import swiglu


def moe_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """x [T, H]; topk_ids [T, K] int; topk_weights [T, K]; gate_up_proj [E, 2I, H], gate rows first; down_proj [E, H, I].

    Returns [T, H] in x's dtype; the sum over K runs in fp32. Experts without tokens get zero gradients.
    """
    tokens, top_k = topk_ids.shape
    ids, order = topk_ids.flatten().sort(stable=True)  # order: [T*K] slots, by expert
    experts = torch.arange(gate_up_proj.shape[0], device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ids, experts, right=True).to(torch.int32)
    rows = x[order // top_k]  # [T*K, H]
    hidden = swiglu(grouped_matmul(rows, gate_up_proj.transpose(1, 2), offsets))
    out = grouped_matmul(hidden, down_proj.transpose(1, 2), offsets)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    out = out[back].unflatten(0, (tokens, top_k))  # [T, K, H]
    wide = torch.promote_types(torch.float32, x.dtype)
    return torch.einsum("tkh,tk->th", out.to(wide), topk_weights.to(wide)).to(x.dtype)
