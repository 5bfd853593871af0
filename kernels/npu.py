"""The primitives as torch_npu's fused operators: the only file that imports torch_npu. No autograd here, that is in fused.py.

torch_npu registers its own derivatives for NPU tensors alone, so forward and backward operators are called by name.
Sources: op-plugin's documentation of each operator, and CANN's of the aclnn operator below it.
"""

from typing import Any

import torch
import torch_npu  # registers torch.ops.npu
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank

npu = torch.ops.npu
profiler = (
    torch_npu.profiler
)  # for qwen35/device.py: who profiles an NPU needs torch_npu, and it is imported here alone
SEQUENCES = 1024  # of one call of the attention, by its documentation
CAUSAL_BLOCK = 2048  # side of the one mask that stands for every causal mask in the operator's compressed form

# ── Mixture of experts: rows are (token, choice) pairs, slot t * K + k, in the order of their experts ──────────────────


def permute(x: Tensor, topk_ids: Tensor, experts: int, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], topk_ids [T, K] -> rows [T*K, H] by expert, place [T*K] int32 (slot -> row), ends [E] int64 of the groups.

    With `count`, only as many rows: the slots of ids >= E, which come last, have places and no rows.
    """
    if not topk_ids.numel() or count == 0:  # to the operator, 0 means all
        place = torch.arange(topk_ids.numel(), dtype=torch.int32, device=x.device)
        return x[:0], place, topk_ids.new_zeros(experts, dtype=torch.int64)
    rows, place = npu.npu_moe_token_permute(x, topk_ids, count)
    return rows, place, _counts(topk_ids, experts).cumsum(0).long()


def histogram(topk_ids: Tensor, experts: int) -> Tensor:
    """topk_ids [T, K] -> [E] int64, how often each expert was chosen; ids >= E are nobody's."""
    if not topk_ids.numel():
        return topk_ids.new_zeros(experts, dtype=torch.int64)
    return _counts(topk_ids, experts).long()


def _counts(topk_ids: Tensor, experts: int) -> Tensor:
    """The histogram in fp32, exact below 2^24: cumsum and sort of int64 would run on the AI CPU (op_api of CANN's ops-math)."""
    return torch.histc(topk_ids.float(), experts, -0.5, experts - 0.5)


def weight_of_row(weights: Tensor, place: Tensor) -> Tensor:
    """weights [T, K], place [T*K] -> [T*K, 1] in the order of the rows.

    The inverse of `place` is a sort of fp32 numbers: AI cores sort no integers, and scatter along the last axis one by one.
    """
    return weights.flatten().index_select(0, place.float().sort().indices)[:, None]


def sorted_rows(
    x: Tensor, topk_ids: Tensor, place: Tensor, out: Tensor | None = None, count: int | None = None
) -> Tensor:
    """The rows of permute again. The operator sorts anew, and writes where it likes: `place` and `out` serve other devices."""
    return npu.npu_moe_token_permute(x, topk_ids, count)[0] if topk_ids.numel() and count != 0 else x[:0]


def weigh(hidden: Tensor, grad_hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden, grad_hidden [N, I], weight [N, 1] fp32 -> their dot products [N]; then both times the weight, in place."""
    dots = (hidden.float() * grad_hidden).sum(-1)
    hidden.mul_(weight)
    grad_hidden.mul_(weight)
    return dots


def permute_backward(grad_rows: Tensor, place: Tensor, top_k: int) -> Tensor:
    """-> grad_x [T, H], each token's K rows summed."""
    if not place.numel():
        return grad_rows
    tokens = len(place) // top_k
    # of the tokens and of the ids, the operator reads the shapes alone
    return npu.npu_moe_token_permute_grad(grad_rows[:tokens], grad_rows, place.view(tokens, top_k), place)


def unpermute(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """rows [T*K, H], weights [T, K] -> y [T, H] = sum over k of weights * the slot's row.

    With fewer rows, the slots whose place is past the last one count for nothing: the operator's kernel in CANN's
    ops-transformer skips them (its documentation speaks of T*K rows alone), and their weights are set to zero besides.
    """
    if not len(rows):
        return rows.new_zeros(len(weights), rows.shape[1])
    if len(rows) < len(place):
        weights = weights.masked_fill((place >= len(rows)).view_as(weights), 0)
    return npu.npu_moe_token_unpermute(rows, place, weights)


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, A] by group, weight [E, A, B] (or a transposed view), ends [E] -> [N, B]: each group times its matrix."""
    if not len(rows):
        return rows.new_zeros(0, weight.shape[2])
    return npu.npu_grouped_matmul([rows], [weight], group_list=ends, split_item=2, group_type=0, group_list_type=0)[0]


def grouped_weight_grad(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """rows [N, A], grad [N, B], ends [E] -> [E, A, B]: rows^T grad inside each group, zeros for an empty one."""
    if not len(rows):
        return rows.new_zeros(len(ends), rows.shape[1], grad.shape[1])
    return npu.npu_grouped_matmul([rows.T], [grad], group_list=ends, split_item=3, group_type=2, group_list_type=0)[0]


# ── Experts of several ranks: counts are on the host, [ep][E/ep] flattened, of each rank's experts in turn ─────────────


def alltoallv_matmul(
    rows: Tensor, weight: Tensor, transposed: bool, name: str, ranks: int, send: list[int], receive: list[int]
) -> tuple[Tensor, Tensor]:
    """rows [T*K, A] by expert of all, to their ranks; there by expert, times weight [E/ep, A, B] or transposed.

    -> the rows as they were multiplied [N, A], and the products [N, B]. `name` of the communicator.
    """
    product, _, came = npu.npu_alltoallv_gmm(
        rows, weight, name, ranks, send, receive, trans_gmm_weight=transposed, permute_out_flag=True
    )
    return came, product


def matmul_alltoallv(
    rows: Tensor, weight: Tensor, transposed: bool, name: str, ranks: int, send: list[int], receive: list[int]
) -> Tensor:
    """rows [N, A] by expert of this rank, times its weights, back to where they came from -> [T*K, B], as they left."""
    return npu.npu_gmm_alltoallv(rows, weight, name, ranks, send, receive, trans_gmm_weight=transposed)[0]


def communicator(group: ProcessGroup) -> str:
    """HCCL's name of the group, for operators that communicate; asked for by the rank among all, which says the device."""
    backend: Any = group._get_backend(torch.device("npu"))
    return backend.get_hccl_comm_name(get_rank())


# ── Elementwise, norms, rotary ─────────────────────────────────────────────────────────────────────────────────────────


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2I], gate first -> silu(gate) * up [..., I]. The operator takes neither empty nor strided tensors."""
    return npu.npu_swiglu(x.contiguous(), -1) if x.numel() else x[..., : x.shape[-1] // 2]


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return npu.npu_swiglu_backward(grad.contiguous(), x.contiguous(), -1) if x.numel() else torch.zeros_like(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x_hat * weight, rstd fp32 for the backward. x bf16 or fp16 with the same or fp32 weights, or both fp32."""
    return npu.npu_rms_norm(x, weight, eps)


def zero_centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x_hat * (1 + weight), rstd. The operator that adds the one takes weights of x's own dtype only."""
    if weight.dtype == x.dtype:
        return npu.npu_gemma_rms_norm(x, weight, eps)
    return npu.npu_rms_norm(x, weight.float() + 1, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """weight is what x_hat was multiplied by -> grad_x, grad_weight fp32"""
    return npu.npu_rms_norm_backward(grad, x, weight, rstd)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, N, R]; cos, sin [1, T, 1, R] in x's dtype, the angles of both halves -> x cos + (-x2, x1) sin, as BSND."""
    return npu.npu_rotary_mul(x[None], cos, sin)[0]


# ── Attention over packed sequences, TND: cumulative lengths on the host, without the leading zero ─────────────────────


def attention(
    q: Tensor, k: Tensor, v: Tensor, ends: list[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [T, Hq, D]; k, v [T, Hkv, D] -> o [T, Hq, D], and max and sum [T, Hq, 8] fp32 and a reserved one for the backward"""
    return npu.npu_fusion_attention(
        q,
        k,
        v,
        q.shape[1],
        "TND",
        atten_mask=_causal_mask(q.device) if causal else None,
        scale=scale,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=3 if causal else 0,
    )[:4]


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: tuple[Tensor, ...],
    ends: list[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """saved: all that attention returned -> grad_q, grad_k, grad_v"""
    out, softmax_max, softmax_sum, reserved = saved
    return npu.npu_fusion_attention_grad(
        q,
        k,
        v,
        grad,
        q.shape[1],
        "TND",
        atten_mask=_causal_mask(q.device) if causal else None,
        softmax_max=softmax_max,
        softmax_sum=softmax_sum,
        softmax_in=reserved,
        attention_in=out,
        scale_value=scale,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=3 if causal else 0,
    )[:3]


def _causal_mask(device: torch.device) -> Tensor:
    """True where a key is hidden. Made when it is needed: 4 MB and two operators are less than one kept for each layer."""
    return torch.ones(CAUSAL_BLOCK, CAUSAL_BLOCK, dtype=torch.bool, device=device).triu_(1)


# ── Cross entropy of logits ────────────────────────────────────────────────────────────────────────────────────────────


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], target [N] int64 in [0, V): the operator ignores no negative label -> loss [N], log_prob [N, V]"""
    return npu.npu_cross_entropy_loss(logits, target, None, "none")[:2]


def cross_entropy_backward(grad: Tensor, log_prob: Tensor, target: Tensor) -> Tensor:
    """grad [N] -> grad_logits [N, V] = grad * (exp(log_prob) - one at the target)"""
    return npu.npu_cross_entropy_loss_backward(grad, log_prob, target, None, None, None, "none")
