"""Attention over packed sequences: softmax(scale q k^T) v inside each sequence, causal or not, grouped KV heads.

Q and K may be put through something first, a norm and a turn: of what that makes nothing is kept, backward makes it again.
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
) -> Tensor:
    """q [T, Hq, D], k, v [T, Hkv, D], cu_seqlens [S+1] on the CPU -> o [T, Hq, D].

    `prepare(q, k, *inputs)` -> the q and k that meet, of the same shapes; None: they are as they come. `recompute_cache`: the layer is run
    again for backward, and its second run takes o and the softmax's statistics from the first.
    """
    return attend(native, q, k, v, cu_seqlens, causal, scale, prepare, inputs, recompute_cache)


def attend(
    primitives: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    prepare: Prepare | None,
    inputs: Sequence[Tensor],
    recompute_cache: RecomputeCache | None = None,
) -> Tensor:
    """The same by the attention and attention_backward of `primitives`, which take at most SEQUENCES sequences in a call."""
    how = primitives, list(_parts(cu_seqlens, primitives.SEQUENCES)), causal, scale, prepare
    return _Attention.apply(how, recompute_cache, q, k, v, *inputs)


def _parts(cu_seqlens: Tensor, most: int) -> Iterator[tuple[slice, list[int]]]:
    """The tokens of each call, and where its sequences end in them. Empty sequences are left out."""
    full = [(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]
    for i in range(0, len(full), most):
        some = full[i : i + most]
        first = some[0][0]
        yield slice(first, some[-1][1]), [end - first for _, end in some]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: tuple, recompute_cache: RecomputeCache | None, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor
    ) -> Tensor:
        do, parts, causal, scale, prepare = ctx.how = how

        def attended() -> tuple[Tensor, ...]:
            made = prepare(q, k, *inputs) if prepare else (q, k)
            calls = []
            for part, ends in parts:
                of_q, of_k, of_v = _of(part, *made, v)
                calls.append(do.attention(of_q, of_k, of_v, ends, causal, scale))
            return _joined([call[0] for call in calls], q), *(x for call in calls for x in call[1:])

        out, *statistics = outputs_once(recompute_cache, attended)
        ctx.save_for_backward(q, k, *inputs, v, out, *statistics)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        do, parts, causal, scale, prepare = ctx.how
        _, _, need_q, need_k, _, *needs = ctx.needs_input_grad
        needs = [need_q, need_k, *needs]
        saved = ctx.saved_tensors
        inputs, (v, out), statistics = saved[: len(needs)], saved[len(needs) :][:2], saved[len(needs) + 2 :]
        made, each = inputs, len(statistics) // max(1, len(parts))
        if prepare:
            inputs = [x.detach().requires_grad_() if need else x for x, need in zip(inputs, needs, strict=True)]
            with torch.enable_grad():
                made = prepare(*inputs)
        grads: list[list[Tensor]] = [[], [], []]
        for i, (part, ends) in enumerate(parts):
            g, q, k, of_v, o = _of(part, grad, *made, v, out)
            found = do.attention_backward(
                g, q, k, of_v, (o, *statistics[i * each : (i + 1) * each]), ends, causal, scale
            )
            for its, x in zip(grads, found, strict=True):
                its.append(x)
        *of_made, grad_v = (_joined(its, x) for its, x in zip(grads, (*made, v), strict=True))
        if not prepare:
            return None, None, *of_made, grad_v
        leaves = [x for x, need in zip(inputs, needs, strict=True) if need]
        # one of the two may hang on nothing that is trained
        pairs = [(x, its) for x, its in zip(made, of_made, strict=True) if x.requires_grad]
        of_leaves = iter(torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs]) if leaves else ())
        grad_q, grad_k, *rest = (next(of_leaves) if need else None for need in needs)
        return None, None, grad_q, grad_k, grad_v, *rest


def _of(part: slice, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tokens of a part. All of them need no view: a device has enough to do."""
    return tensors if part == slice(0, len(tensors[0])) else tuple(x[part] for x in tensors)


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.zeros_like(like)
