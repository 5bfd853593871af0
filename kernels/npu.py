"""The primitives as torch_npu's fused operators; the only file that imports torch_npu.

The autograd.Functions over them are in each op's file: torch_npu registers derivatives for NPU
tensors only, so this file calls forward and backward operators by name. Shapes as in native.py; all
follow from the inputs' shapes, and nothing waits for the device: lengths come from the host.
Sources: op-plugin's documentation of each operator, and CANN's of the aclnn operator below it.
"""

from typing import Any

import torch
import torch.nn.functional as F
import torch_npu  # registers torch.ops.npu
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank

npu = torch.ops.npu
profiler = torch_npu.profiler  # for qwen35/device.py, which must not import torch_npu
SEQUENCES = 1024  # per call of attention, by the operator's documentation
LOGIT_BLOCKS = 4  # a chunk's logits have so many times CHUNK_LOGITS elements; as many at once are fp32
CAUSAL_BLOCK = 2048  # side of the compressed mask that the operator expects for any causal mask

# ── Mixture of experts; slots and rows as in moe.py ───────────────────────────────────────────────


def permute(x: Tensor, topk_ids: Tensor, experts: int, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if not topk_ids.numel() or count == 0:  # to the operator, 0 means all
        row_of_slot = torch.arange(topk_ids.numel(), dtype=torch.int32, device=x.device)
        return x[:0], row_of_slot, topk_ids.new_zeros(experts, dtype=torch.int64)
    rows, row_of_slot = npu.npu_moe_token_permute(x, topk_ids, count)
    return rows, row_of_slot, _counts(topk_ids, experts).cumsum(0).long()


def histogram(topk_ids: Tensor, experts: int) -> Tensor:
    """topk_ids [T, K] -> [E] int64, how often each expert was chosen; ids >= E are ignored."""
    if not topk_ids.numel():
        return topk_ids.new_zeros(experts, dtype=torch.int64)
    return _counts(topk_ids, experts).long()


def _counts(topk_ids: Tensor, experts: int) -> Tensor:
    """The histogram in fp32, exact below 2^24. int64 sums run on the AI CPU (ops-math)."""
    return torch.histc(topk_ids.float(), experts, -0.5, experts - 0.5)


def weight_of_row(weights: Tensor, row_of_slot: Tensor) -> Tensor:
    """weights [T, K], row_of_slot [T*K] -> [T*K, 1] in the order of the rows.

    `row_of_slot` is inverted by sorting it as fp32: AI cores do not sort integers, and they scatter
    along the last axis one element at a time.
    """
    return weights.flatten().index_select(0, row_of_slot.float().sort().indices)[:, None]


def sorted_rows(
    x: Tensor, topk_ids: Tensor, row_of_slot: Tensor, out: Tensor | None = None, count: int | None = None
) -> Tensor:
    """The rows of permute, again. The operator needs neither `row_of_slot` nor `out`."""
    return npu.npu_moe_token_permute(x, topk_ids, count)[0] if topk_ids.numel() and count != 0 else x[:0]


def weigh(hidden: Tensor, grad_hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As native.weigh; weight is fp32. The backward of `unpermute` for tokens of one row each, in
    their order: it reads both once, and computes in fp32.
    """
    if not len(hidden):
        return weight[:, 0], grad_hidden
    place = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
    grad_hidden, dots = npu.npu_moe_token_unpermute_grad(hidden, grad_hidden, place, weight)
    hidden.mul_(weight)
    return dots[:, 0], grad_hidden


def permute_backward(grad_rows: Tensor, row_of_slot: Tensor, top_k: int) -> Tensor:
    if not row_of_slot.numel():
        return grad_rows
    tokens = len(row_of_slot) // top_k
    # the operator reads only the shapes of its first and third argument
    return npu.npu_moe_token_permute_grad(grad_rows[:tokens], grad_rows, row_of_slot.view(tokens, top_k), row_of_slot)


def unpermute(rows: Tensor, row_of_slot: Tensor, weights: Tensor) -> Tensor:
    """Slots whose row is past the last one count as zero. The operator's kernel in CANN's
    ops-transformer skips them, but its documentation mentions T*K rows only, so their weights are
    zeroed as well.
    """
    if not len(rows):
        return rows.new_zeros(len(weights), rows.shape[1])
    if len(rows) < len(row_of_slot):
        weights = weights.masked_fill((row_of_slot >= len(rows)).view_as(weights), 0)
    return npu.npu_moe_token_unpermute(rows, row_of_slot, weights)


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, A] by expert, weight [E, A, B] or a transposed view, ends [E] -> [N, B]."""
    if not len(rows):
        return rows.new_zeros(0, weight.shape[2])
    return npu.npu_grouped_matmul([rows], [weight], group_list=ends, split_item=2, group_type=0, group_list_type=0)[0]


def grouped_weight_grad(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """rows [N, A], grad [N, B] by expert, ends [E] -> rows^T grad [E, A, B], zeros without rows."""
    if not len(rows):
        return rows.new_zeros(len(ends), rows.shape[1], grad.shape[1])
    return npu.npu_grouped_matmul([rows.T], [grad], group_list=ends, split_item=3, group_type=2, group_list_type=0)[0]


# ── Expert parallelism: counts are on the host, [ep * E/ep], of each rank's experts in turn ───────


def alltoallv_matmul(
    rows: Tensor, weight: Tensor, transposed: bool, name: str, ranks: int, send: list[int], receive: list[int]
) -> tuple[Tensor, Tensor]:
    """Dispatch rows [T*K, A] to the ranks of their experts and multiply them there.

    weight [E/ep, A, B] or transposed; name: of HCCL's communicator -> the rows by local expert
    [N, A], their products [N, B].
    """
    product, _, arrived = npu.npu_alltoallv_gmm(
        rows, weight, name, ranks, send, receive, trans_gmm_weight=transposed, permute_out_flag=True
    )
    return arrived, product


def matmul_alltoallv(
    rows: Tensor, weight: Tensor, transposed: bool, name: str, ranks: int, send: list[int], receive: list[int]
) -> Tensor:
    """Multiply rows [N, A] by local expert and send the products back -> [T*K, B]."""
    return npu.npu_gmm_alltoallv(rows, weight, name, ranks, send, receive, trans_gmm_weight=transposed)[0]


def communicator(group: ProcessGroup) -> str:
    """HCCL's name of the group, for operators that communicate. It takes the global rank."""
    backend: Any = group._get_backend(torch.device("npu"))
    return backend.get_hccl_comm_name(get_rank())


# ── Elementwise, norms, rotary ────────────────────────────────────────────────────────────────────


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2I], gate first -> [..., I]. The operator takes neither empty nor strided tensors."""
    return npu.npu_swiglu(x.contiguous(), -1) if x.numel() else x[..., : x.shape[-1] // 2]


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return npu.npu_swiglu_backward(grad.contiguous(), x.contiguous(), -1) if x.numel() else torch.zeros_like(x)


def zero_centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x_hat * (1 + weight), rstd. The operator that adds the 1 takes weights of x's dtype only."""
    if weight.dtype == x.dtype:
        return npu.npu_gemma_rms_norm(x, weight, eps)
    return npu.npu_rms_norm(x, weight.float() + 1, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need: bool) -> tuple[Tensor, Tensor]:
    """weight: the factor of x_hat -> grad_x, grad_weight fp32, which the operator never omits."""
    return npu.npu_rms_norm_backward(grad, x, weight, rstd)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm is fused, the gate is not; backward computes the normed x again."""
    normed, rstd = npu.npu_rms_norm(x, weight, eps)
    return normed * F.silu(gate), rstd


def rms_norm_gated_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, eps: float, need: bool
) -> tuple[Tensor, Tensor, Tensor]:
    normed, _ = npu.npu_rms_norm(x, weight, eps)
    grad_gate = torch.ops.aten.silu_backward(grad * normed, gate)
    grad_x, grad_weight = rms_norm_backward(grad * F.silu(gate), x, weight, rstd, need)
    return grad_x, grad_gate, grad_weight


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The operator takes cos and sin in q's dtype: bf16 rounds them, as in transformers."""
    width = 2 * cos.shape[1]
    angles = torch.cat([cos, cos, sin, sin], dim=1).to(q.dtype).view(1, -1, 1, 2 * width)
    cos, sin = angles.split(width, dim=3)  # [1, T, 1, R] each, of both halves
    first, second = (
        npu.npu_rotary_mul(x[None], cos, sin)[0]
        if x.shape[2] == width
        else torch.cat([npu.npu_rotary_mul(x[None, ..., :width], cos, sin)[0], x[..., width:]], dim=-1)
        for x in (q, k)
    )
    return first, second


# ── Attention over packed sequences, layout TND; ends: cu_seqlens[1:] on the host ─────────────────


def attention(
    q: Tensor, k: Tensor, v: Tensor, ends: list[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [T, Hq, D]; k, v [T, Hkv, D] -> o [T, Hq, D], max and sum [T, Hq, 8] fp32, reserved."""
    return npu.npu_fusion_attention(
        q, k, v, q.shape[1], "TND", atten_mask=_causal_mask(q.device) if causal else None, scale=scale,
        actual_seq_qlen=ends, actual_seq_kvlen=ends, sparse_mode=3 if causal else 0,
    )[:4]  # fmt: skip


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: tuple[Tensor, ...], ends: list[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """saved: all that attention returned -> grad_q, grad_k, grad_v"""
    out, softmax_max, softmax_sum, reserved = saved
    return npu.npu_fusion_attention_grad(
        q, k, v, grad, q.shape[1], "TND", atten_mask=_causal_mask(q.device) if causal else None,
        softmax_max=softmax_max, softmax_sum=softmax_sum, softmax_in=reserved, attention_in=out, scale_value=scale,
        actual_seq_qlen=ends, actual_seq_kvlen=ends, sparse_mode=3 if causal else 0,
    )[:3]  # fmt: skip


def _causal_mask(device: torch.device) -> Tensor:
    """True where a key is hidden. Made per call: saving it would cost each layer 4 MB."""
    return torch.ones(CAUSAL_BLOCK, CAUSAL_BLOCK, dtype=torch.bool, device=device).triu_(1)


# ── The output head ───────────────────────────────────────────────────────────────────────────────


def rows_with_label(labels: Tensor) -> Tensor:
    """All rows: looking up those with a label would sync."""
    return torch.arange(len(labels), device=labels.device)


def cross_entropy(logits: Tensor, target: Tensor, scale: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The operators take fp32 logits, and targets in [0, V), never negative.

    A block of the bf16 logits at a time is turned into fp32, and replaced by its gradient. Few
    chunks are large ones: each is added to the [V, H] fp32 gradient of the weight.
    """
    losses = []
    size = -(-len(logits) // LOGIT_BLOCKS)
    for block, of_target, of_scale in zip(logits.split(size), target.split(size), scale.split(size), strict=True):
        loss, log_prob = npu.npu_cross_entropy_loss(block.float(), of_target, None, "none")[:2]
        losses.append(loss)
        if need_grad:
            grad = npu.npu_cross_entropy_loss_backward(of_scale, log_prob, of_target, None, None, None, "none")
            block.copy_(grad)
            del grad  # before the next block's
        del log_prob
    return torch.cat(losses), logits if need_grad else None


def head_hidden_grad(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight


def head_weight_grad(total: Tensor, grad: Tensor, hidden: Tensor, add: bool) -> None:
    if add:
        total.add_(grad.T @ hidden)
    elif total.dtype == grad.dtype:
        torch.mm(grad.T, hidden, out=total)
    else:
        total.copy_(grad.T @ hidden)
