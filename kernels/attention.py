"""Attention over packed sequences: softmax(scale q k^T) v inside each, with grouped KV heads.

A `prepare` function (norm and rotary embedding) may be fused in: its results are not saved,
backward computes them again. Source: Dao 2023, FlashAttention-2, arXiv:2307.08691; grouped heads:
arXiv:2305.13245.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import native
from kernels.recompute_cache import RecomputeCache, outputs_once

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
    recompute_cache: RecomputeCache | None = None,
    primitives: ModuleType = native,
) -> Tensor:
    """q [T, Hq, D], k, v [T, Hkv, D], cu_seqlens [S+1] on the CPU -> o [T, Hq, D].

    prepare(q, k, *inputs) -> q and k of the same shapes; None uses them as they are. With a
    recompute cache the layer's second run takes o and the softmax statistics from the first.
    primitives: the module that implements attention, for up to SEQUENCES sequences per call.
    """
    options = primitives, list(_calls(cu_seqlens, primitives.SEQUENCES)), causal, scale, prepare
    return _Attention.apply(options, recompute_cache, q, k, v, *inputs)


def _calls(cu_seqlens: Tensor, max_sequences: int) -> Iterator[tuple[slice, list[int]]]:
    """The tokens of each call and where its sequences end in them, without empty sequences."""
    full = [(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]
    for i in range(0, len(full), max_sequences):
        batch = full[i : i + max_sequences]
        first = batch[0][0]
        yield slice(first, batch[-1][1]), [end - first for _, end in batch]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: tuple, cache: RecomputeCache | None, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor
    ) -> Tensor:
        ops, parts, causal, scale, prepare = ctx.options = options

        def compute() -> tuple[Tensor, ...]:
            prepared = prepare(q, k, *inputs) if prepare else (q, k)
            calls = []
            for part, ends in parts:
                part_q, part_k, part_v = _slice_tokens(part, *prepared, v)
                calls.append(ops.attention(part_q, part_k, part_v, ends, causal, scale))
            return _concatenate([call[0] for call in calls], q), *(x for call in calls for x in call[1:])

        out, *statistics = outputs_once(cache, compute)
        ctx.save_for_backward(q, k, *inputs, v, out, *statistics)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ops, parts, causal, scale, prepare = ctx.options
        _, _, need_q, need_k, _, *needs = ctx.needs_input_grad
        needs = [need_q, need_k, *needs]
        saved = ctx.saved_tensors
        inputs, (v, out), statistics = saved[: len(needs)], saved[len(needs) :][:2], saved[len(needs) + 2 :]
        prepared, per_call = inputs, len(statistics) // max(1, len(parts))
        if prepare:
            inputs = [x.detach().requires_grad_() if need else x for x, need in zip(inputs, needs, strict=True)]
            with torch.enable_grad():
                prepared = prepare(*inputs)
        grads: list[list[Tensor]] = [[], [], []]
        for i, (part, ends) in enumerate(parts):
            g, q, k, part_v, o = _slice_tokens(part, grad, *prepared, v, out)
            saved = (o, *statistics[i * per_call : (i + 1) * per_call])
            part_grads = ops.attention_backward(g, q, k, part_v, saved, ends, causal, scale)
            for collected, x in zip(grads, part_grads, strict=True):
                collected.append(x)
        *grads_prepared, grad_v = (
            _concatenate(collected, x) for collected, x in zip(grads, (*prepared, v), strict=True)
        )
        if not prepare:
            return None, None, *grads_prepared, grad_v
        leaves = [x for x, need in zip(inputs, needs, strict=True) if need]
        # q or k alone may depend on nothing that needs a gradient
        pairs = [(x, collected) for x, collected in zip(prepared, grads_prepared, strict=True) if x.requires_grad]
        leaf_grads = iter(torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs]) if leaves else ())
        grad_q, grad_k, *rest = (next(leaf_grads) if need else None for need in needs)
        return None, None, grad_q, grad_k, grad_v, *rest


def _slice_tokens(part: slice, *tensors: Tensor) -> tuple[Tensor, ...]:
    """A view of the tokens in `part`, or the tensors themselves if that is all of them."""
    return tensors if part == slice(0, len(tensors[0])) else tuple(x[part] for x in tensors)


def _concatenate(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.zeros_like(like)
