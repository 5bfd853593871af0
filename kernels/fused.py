"""The operators on an NPU: autograd.Functions over the primitives of npu.py. Signatures as in each operator's own file.

Each saves the least, and recomputes what is cheap. Every shape follows from the inputs' shapes, and nothing waits for the
device: lengths come from cu_seqlens, which is on the host.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import moe, npu
from kernels.attention import Prepare
from kernels.cross_entropy import chunks

SEQUENCES = 1024  # of one call of the fused attention, by its documentation


def moe_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    return moe.moe_experts(x, topk_ids, topk_weights, gate_up_proj, down_proj, primitives=npu)


def swiglu(x: Tensor) -> Tensor:
    return _Swiglu.apply(x)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return npu.swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return npu.swiglu_backward(grad, *ctx.saved_tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = npu.zero_centred_rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = npu.rms_norm_backward(grad, x, weight.float() + 1, rstd)
        return grad_x, grad_weight.to(weight.dtype), None


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RmsNormGated.apply(x, gate, weight, eps)


class _RmsNormGated(torch.autograd.Function):
    """The norm is fused, the gate is not: the normed x is made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, rstd = npu.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.eps = eps
        return normed * F.silu(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, rstd = ctx.saved_tensors
        normed, _ = npu.rms_norm(x, weight, ctx.eps)
        grad_gate = torch.ops.aten.silu_backward(grad * normed, gate)
        grad_x, grad_weight = npu.rms_norm_backward(grad * F.silu(gate), x, weight, rstd)
        return grad_x, grad_gate, grad_weight.to(weight.dtype), None


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The operator takes the angles in q's dtype: bf16 rounds them, as transformers does for the text."""
    return _Rotary.apply(q, k, cos, sin)


class _Rotary(torch.autograd.Function):
    """Keeps nothing but the angles, which all layers share: the gradient turns back by them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn((q, k), cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_turn((grad_q, grad_k), cos, -sin), None, None


def _turn(tensors: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H, D] each, the first R of D dimensions by the angles [T, R/2]"""
    width = 2 * cos.shape[1]
    angles = torch.cat([cos, cos, sin, sin], dim=1).to(tensors[0].dtype).view(1, -1, 1, 2 * width)
    cos, sin = angles.split(width, dim=3)
    first, second = (
        npu.rotate(x, cos, sin)
        if x.shape[2] == width
        else torch.cat([npu.rotate(x[..., :width], cos, sin), x[..., width:]], dim=-1)
        for x in tensors
    )
    return first, second


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
    return _Attention.apply(_parts(cu_seqlens), causal, scale, prepare, q, k, v, *inputs)


def _parts(cu_seqlens: Tensor) -> list[tuple[slice, list[int]]]:
    """The tokens of each call, and where its sequences end in them. Empty sequences are left out."""
    full = [(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]
    calls = [full[i : i + SEQUENCES] for i in range(0, len(full), SEQUENCES)]
    return [(slice(call[0][0], call[-1][1]), [end - call[0][0] for _, end in call]) for call in calls]


class _Attention(torch.autograd.Function):
    """Of what `prepare` makes of q and k nothing is kept: backward makes it again."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: list,
        causal: bool,
        scale: float,
        prepare: Prepare | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *more: Tensor,
    ) -> Tensor:
        ctx.how = parts, causal, scale, prepare
        made = prepare(q, k, *more) if prepare else (q, k)
        calls = []
        for part, ends in parts:
            of_q, of_k, of_v = _of(part, *made, v)
            calls.append(npu.attention(of_q, of_k, of_v, ends, causal, scale))
        out = _joined([call[0] for call in calls], q)
        ctx.save_for_backward(q, k, *more, v, out, *(x for call in calls for x in call[1:]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts, causal, scale, prepare = ctx.how
        needs = [*ctx.needs_input_grad[4:6], *ctx.needs_input_grad[7:]]
        saved = ctx.saved_tensors
        inputs, (v, out), stats = saved[: len(needs)], saved[len(needs) :][:2], saved[len(needs) + 2 :]
        made = inputs
        if prepare:
            inputs = [x.detach().requires_grad_() if need else x for x, need in zip(inputs, needs, strict=True)]
            with torch.enable_grad():
                made = prepare(*inputs)
        grads: list[list[Tensor]] = [[], [], []]
        for i, (part, ends) in enumerate(parts):
            g, q, k, of_v, o = _of(part, grad, *made, v, out)
            found = npu.attention_backward(g, q, k, of_v, (o, *stats[3 * i : 3 * i + 3]), ends, causal, scale)
            for its, x in zip(grads, found, strict=True):
                its.append(x)
        *of_made, grad_v = (_joined(its, x) for its, x in zip(grads, (*made, v), strict=True))
        if not prepare:
            return None, None, None, None, *of_made, grad_v
        leaves = [x for x, need in zip(inputs, needs, strict=True) if need]
        of_leaves = iter(torch.autograd.grad(made, leaves, of_made) if leaves else ())
        of_q, of_k, *rest = (next(of_leaves) if need else None for need in needs)
        return None, None, None, None, of_q, of_k, grad_v, *rest


def _of(part: slice, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tokens of a part. All of them are no view: a device has enough to do."""
    return tensors if part == slice(0, len(tensors[0])) else tuple(x[part] for x in tensors)


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.zeros_like(like)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, trained: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Without `trained`, every token takes part: the device alone knows which have a label, and is not waited for."""
    if trained is None:
        trained = torch.arange(len(labels), device=labels.device)
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, trained, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in forward, chunk by chunk, while the chunk's logits are there: three matmuls in all."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        trained: Tensor,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        has_label, targets = labels >= 0, labels.clamp(min=0)
        scales = token_weights.float() * has_label
        token_loss = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        for rows, is_real in chunks(trained, weight.shape[0]):
            h, target = hidden[rows], targets[rows]
            loss, log_prob = npu.cross_entropy((h @ weight.T).float(), target)
            token_loss.index_add_(0, rows, loss * is_real)
            if need_hidden or need_weight:
                grad = npu.cross_entropy_backward(scales[rows] * is_real, log_prob, target).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden.index_add_(0, rows, grad @ weight)
                if grad_weight is not None:
                    grad_weight += grad.T @ h
        token_loss *= has_label
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(token_loss)
        return (token_loss * scales).sum(), token_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = (grad_hidden * grad_loss).to(grad_hidden.dtype) if grad_hidden is not None else None
        grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype) if grad_weight is not None else None
        return grad_hidden, grad_weight, None, None, None, None
