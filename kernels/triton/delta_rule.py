"""The gated delta rule as Triton kernels. Signature and maths as in kernels/gated_delta_rule.py.

Saved for backward: the inputs, and each chunk's inverse, gates and norms; the states are computed
again. With a recompute cache a layer's second run computes only what is saved, without the scan.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.recompute_cache import RecomputeCache, outputs_once
from kernels.triton import delta_rule_launch as launch
from kernels.triton.chunks import chunk_tables
from kernels.triton.tiles import HEAD_SIZES, Tiles


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    recompute_cache: RecomputeCache | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """As kernels.chunk_gated_delta_rule. Raises ValueError on head sizes not in HEAD_SIZES.

    tiles: by default the largest.
    """
    for size in (q.shape[2], v.shape[2]):
        if size not in HEAD_SIZES:
            raise ValueError(
                f"chunk_gated_delta_rule: the Triton kernels take heads of {HEAD_SIZES}, not of {size}; set"
                " model.kernels.chunk_gated_delta_rule=native"
            )
    if not len(v):
        return torch.zeros_like(v)
    tiles = tiles or Tiles.of(q.shape[2], v.shape[2])
    options = *chunk_tables(cu_seqlens, tiles.chunk, v.device), tiles, recompute_cache
    return _DeltaRule.apply(options, q, k, v, g, beta)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: tuple, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        chunks, sequences, tiles, recompute_cache = options
        q, k, v = (_contiguous_heads(x) for x in (q, k, v))
        g, beta = g.contiguous(), beta.contiguous()
        gates, norms = launch.prepare(q, k, g, beta, chunks, tiles.chunk)
        inverse = launch.invert(k, gates, norms, chunks)
        ctx.save_for_backward(q, k, v, inverse, gates, norms, chunks, sequences)
        ctx.gate_dtypes, ctx.columns = (g.dtype, beta.dtype), tiles.columns
        inputs = q, k, v, inverse, gates, norms, sequences
        return outputs_once(recompute_cache, lambda: (launch.scan(*inputs, tiles.columns),))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, inverse, gates, norms, chunks, sequences = ctx.saved_tensors
        grad = grad.contiguous()
        entering = launch.states(k, v, inverse, gates, norms, sequences, ctx.columns)
        scan_inputs = q, k, inverse, gates, norms, grad, entering, sequences, ctx.columns
        leaving, decay_parts = launch.grad_states(*scan_inputs)
        inputs = q, k, v, inverse, gates, norms, grad, entering, leaving, chunks
        grad_q, grad_k, grad_v, grad_gates = launch.gradients(*inputs)
        grad_g, grad_beta, *sums = launch.finish(grad_gates, decay_parts, grad_q, grad_k, chunks, k.shape[1])
        if k.shape[1] != v.shape[1]:
            grad_q, grad_k = sums
        g_dtype, beta_dtype = ctx.gate_dtypes
        return None, grad_q, grad_k, grad_v, grad_g.to(g_dtype), grad_beta.to(beta_dtype)


def _contiguous_heads(x: Tensor) -> Tensor:
    """x itself if each token's heads are contiguous, as in slices of one projection, or a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
