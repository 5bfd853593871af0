"""The ops on an NPU: autograd.Functions over npu.py's primitives. Signatures as in each op's file.

Each saves little and recomputes what is cheap. All shapes follow from the inputs' shapes, and
nothing waits for the device: lengths come from cu_seqlens, which is on the host.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import attention, moe, moe_parallel, npu
from kernels.cross_entropy import chunks
from kernels.recompute_cache import RecomputeCache

VOCABULARY_SLICE = 1 << 15  # rows of the head's gradient that are scaled at once


def moe_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    return moe.moe_experts(x, topk_ids, topk_weights, gate_up_proj, down_proj, primitives=npu)


def moe_experts_parallel(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    group: ProcessGroup,
    recompute_cache: RecomputeCache | None = None,
    count_reader: moe_parallel.CountReader = moe_parallel.read_counts,
) -> Tensor:
    return moe_parallel.moe_experts_parallel(
        x,
        topk_ids,
        topk_weights,
        gate_up_proj,
        down_proj,
        group,
        recompute_cache,
        primitives=npu,
        count_reader=count_reader,
    )


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
    """The norm is fused, the gate is not; backward computes the normed x again."""

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
    """The operator takes cos and sin in q's dtype: bf16 rounds them, as in transformers."""
    return _Rotary.apply(q, k, cos, sin)


class _Rotary(torch.autograd.Function):
    """Saves only the angles, which all layers share; backward rotates by their negatives."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate((q, k), cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotate((grad_q, grad_k), cos, -sin), None, None


def _rotate(tensors: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """tensors [T, H, D]; cos, sin [T, R/2], of the first R dimensions"""
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
    prepare: attention.Prepare | None = None,
    inputs: Sequence[Tensor] = (),
    recompute_cache: RecomputeCache | None = None,
) -> Tensor:
    return attention.attend(npu, q, k, v, cu_seqlens, causal, scale, prepare, inputs, recompute_cache)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, label_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Without `label_rows` all tokens take part: looking up those with a label would sync."""
    if label_rows is None:
        label_rows = torch.arange(len(labels), device=labels.device)
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, label_rows, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in forward, as in cross_entropy.py."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        label_rows: Tensor,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        has_label, targets = labels >= 0, labels.clamp(min=0)
        scales = token_weights.float() * has_label
        token_loss = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        for rows, is_real in chunks(label_rows, weight.shape[0]):
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
        if grad_weight is not None:
            scaled = torch.empty(grad_weight.shape, dtype=ctx.weight_dtype, device=grad_weight.device)
            for part, out in zip(grad_weight.split(VOCABULARY_SLICE), scaled.split(VOCABULARY_SLICE), strict=True):
                out.copy_(part * grad_loss)  # all at once would be another [V, D] fp32 near the memory peak
            grad_weight = scaled
        return grad_hidden, grad_weight, None, None, None, None
