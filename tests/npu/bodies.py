"""CPU implementations of CANN's operators: a slow, literal reading of their documentation.

Written from op-plugin's docs/zh/custom_APIs and CANN's aclnn pages, not from kernels/npu.py, so
that that file's reading of an operator (index order, meaning of masks, labels, group ends) is
checked against a second one. Sums run in fp32; results have the documented dtypes. Calls outside
the documented limits fail: limits on dtypes, shapes and layouts in rehearse/limits.py, on values
here.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from rehearse.limits import problems

HALF = (torch.float16, torch.bfloat16)
MOST_ROWS = 52_428_800  # that a rank sends in a fused exchange


def moe_token_permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    """sortedIndices = argsort(argsort(indices)); permuted[sortedIndices[i]] = tokens[i // topK],
    cut to numOutTokens rows

    where that is above 0; 0 would cut nothing.
    """
    assert not padded_mode and tokens.numel() and num_out_tokens in (None, *range(1, indices.numel() + 1))
    assert indices.numel() < 16777215 and 0 <= indices.min() <= indices.max() < 16777215
    place = indices.flatten().argsort(stable=True).argsort(stable=True)
    permuted = torch.empty(len(place), tokens.shape[1], dtype=tokens.dtype)
    for i, row in enumerate(place.tolist()):
        permuted[row] = tokens[i // indices.shape[1]]
    return permuted[:num_out_tokens].clone(), place.to(torch.int32)


def moe_token_permute_grad(tokens, grad_permuted_tokens, indices, sorted_indices, padded_mode=False):
    """The aclnn operator takes the gradient, sortedIndices and topK; of the others only shapes."""
    assert not padded_mode and grad_permuted_tokens.numel()
    top_k = indices.shape[1]
    grad = torch.zeros(tokens.shape, dtype=torch.float32)
    for i, row in enumerate(sorted_indices.tolist()):
        grad[i // top_k] += grad_permuted_tokens[row].float()
    return grad.to(tokens.dtype)


def moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    """out[i] = sum over j of permuted[sortedIndices[i * topK + j]] * probs[i][j]; indices in [0,
    tokens * topK), none twice.

    Skips indices past the rows and zero weights, as moe_token_unpermute.h of ops-transformer.
    """
    assert probs is not None and probs.ndim == 2 and not padded_mode
    assert sorted_indices.sort().values.equal(torch.arange(probs.numel(), dtype=torch.int32)) and len(permuted_tokens)
    out = torch.zeros(probs.shape[0], permuted_tokens.shape[1], dtype=torch.float32)
    for i in range(probs.shape[0]):
        for j in range(probs.shape[1]):
            if (row := int(sorted_indices[i * probs.shape[1] + j])) < len(permuted_tokens):
                out[i] += permuted_tokens[row].float() * probs[i, j].float()
            else:
                assert not probs[i, j]  # undocumented, so both conditions are required
    return out.to(permuted_tokens.dtype)


def moe_token_unpermute_grad(
    permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None
):
    """With row r = sortedIndices[i * topK + j]: permutedTokensGrad[r] = grad[i] * probs[i][j], and
    probsGrad[i][j] is the sum of permutedTokens[r] * grad[i] over the hidden axis.
    """
    assert probs is not None and not padded_mode and restore_shape is None
    grad_rows, grad_probs = torch.empty_like(permuted_tokens), torch.empty_like(probs)
    for i in range(probs.shape[0]):
        for j in range(probs.shape[1]):
            row, grad = int(sorted_indices[i * probs.shape[1] + j]), grad_unpermuted_tokens[i].float()
            grad_rows[row] = (grad * probs[i, j].float()).to(grad_rows.dtype)
            grad_probs[i, j] = (permuted_tokens[row].float() * grad).sum().to(probs.dtype)
    return grad_rows, grad_probs


def grouped_matmul(x, weight, *, group_list=None, split_item=0, group_type=None, group_list_type=0, **others):
    """group_type 0: rows in groups, y_i = x_i @ weight_i. 2: the inner axis in groups, x
    transposed, y [groups, m, n].
    """
    assert not any(v for v in others.values()) and split_item in (2, 3) and group_list_type == 0
    assert len(x) == len(weight) == 1
    x, weight, ends = x[0], weight[0], [0, *group_list.tolist()]
    assert all(a <= b for a, b in pairwise(ends))
    if group_type == 0:
        assert len(weight) == len(group_list) and ends[-1] == x.shape[0]
        parts = [x[a:b].float() @ w.float() for (a, b), w in zip(pairwise(ends), weight, strict=True)]
        return [torch.cat(parts).to(x.dtype)]
    assert group_type == 2 and ends[-1] == x.shape[1] == weight.shape[0]
    return [torch.stack([x[:, a:b].float() @ weight[a:b].float() for a, b in pairwise(ends)]).to(x.dtype)]


def _exchange(rows, ranks, send, receive):
    """Counts [rank][local expert], flattened, of the rows to or from each rank's experts.

    What a rank sends to another's experts is what that one receives.
    """
    told = torch.empty(len(receive), dtype=torch.int64)
    dist.all_to_all_single(told, torch.tensor(send))
    assert told.tolist() == receive, f"the others send {told.tolist()}, not {receive}"
    out = rows.new_empty(sum(receive), rows.shape[1])
    splits = (
        [sum(part) for part in zip(*[iter(counts)] * (len(counts) // ranks), strict=True)] for counts in (receive, send)
    )
    dist.all_to_all_single(out, rows, *splits)
    return out


def check_exchange(x, weight, hcom, ranks, send, receive, is_transposed, routed, others):
    """Atlas A3: half precision, 8 to 128 ranks, e <= 32, e * ep <= 256, H1 and N1 < 65536, BSK rows
    sent by npu_alltoallv_gmm and received by npu_gmm_alltoallv, host counts, no shared expert.

    Of fake tensors too; ladder_experts.py has a call for each line.
    """
    assert x.dtype in HALF and x.dtype == weight.dtype, f"gmm_x {x.dtype}, gmm_weight {weight.dtype}"
    assert x.ndim == 2 and weight.ndim == 3 and x.is_contiguous() and weight.is_contiguous(), "axes or strides"
    assert x.shape[1] == weight.shape[2 if is_transposed else 1], "rows and weights of different widths"
    assert max(weight.shape[1:]) < 65536, f"an axis of {max(weight.shape[1:])}"
    assert ranks in (8, 16, 32, 64, 128), f"{ranks} ranks"
    assert len(weight) <= 32 and len(weight) * ranks <= 256, f"{len(weight)} experts on each of {ranks} ranks"
    assert len(send) == len(receive) == len(weight) * ranks, f"{len(send)} and {len(receive)} counts"
    assert sum(send) == len(x), f"counts of {sum(send)} for {len(x)} rows"
    assert 0 < routed < MOST_ROWS, f"{routed} rows to exchange"
    assert 0 < len(hcom) < 128 and all(x is None or x is False for x in others.values()), (
        "hcom's length, or a shared expert"
    )


def alltoallv_gmm(x, weight, hcom, ranks, send, receive, *, trans_gmm_weight=False, permute_out_flag=False, **others):
    """AlltoAllv, Permute (expert-major, then rank), GroupedMatMul; may return permuted rows."""
    check_exchange(x, weight, hcom, ranks, send, receive, trans_gmm_weight, sum(send), others)
    parts = _exchange(x, ranks, send, receive).split(receive)
    experts = len(weight)
    rows = [torch.cat(parts[e::experts]) for e in range(experts)]
    weight = weight.transpose(1, 2) if trans_gmm_weight else weight
    product = torch.cat([x.float() @ w.float() for x, w in zip(rows, weight, strict=True)]).to(x.dtype)
    return product, torch.empty(0), torch.cat(rows) if permute_out_flag else torch.empty(0)


def gmm_alltoallv(x, weight, hcom, ranks, send, receive, *, trans_gmm_weight=False, **others):
    """GroupedMatMul, Unpermute (rank-major, then expert), AlltoAllv; counts [rank][localExpert]."""
    check_exchange(x, weight, hcom, ranks, send, receive, trans_gmm_weight, sum(receive), others)
    experts = len(weight)
    by_expert = [send[r * experts + e] for e in range(experts) for r in range(ranks)]
    weight = weight.transpose(1, 2) if trans_gmm_weight else weight
    parts = [part.float() @ weight[i // ranks].float() for i, part in enumerate(x.split(by_expert))]
    rows = torch.cat([parts[e * ranks + r] for r in range(ranks) for e in range(experts)]).to(x.dtype)
    return _exchange(rows, ranks, send, receive), torch.empty(0)


def swiglu(x, dim=-1):
    """A * sigmoid(A) * B, where A is the first half. No strided or empty tensors."""
    a, b = x.float().chunk(2, dim)
    return (a * torch.sigmoid(a) * b).to(x.dtype)


def swiglu_backward(grad_output, x, dim=-1):
    a, b = x.float().chunk(2, dim)
    s, grad = torch.sigmoid(a), grad_output.float()
    return torch.cat([grad * b * (s + a * s * (1 - s)), grad * a * s], dim).to(x.dtype)


def rms_norm(x, gamma, epsilon=1e-6):
    """x / Rms(x) * g, and 1 / Rms(x) in fp32 with ones for the normed axes"""
    rstd = 1 / torch.sqrt((x.float() ** 2).mean(-1, keepdim=True) + epsilon)
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


def gemma_rms_norm(x, gamma, epsilon=1e-6):
    """x / Rms(x) * (1 + g), g of x's dtype"""
    y, rstd = rms_norm(x.float(), gamma.float() + 1, epsilon)
    return y.to(x.dtype), rstd


def rms_norm_backward(dy, x, gamma, rstd):
    """dx and dgamma, the second in fp32 whatever the inputs"""
    x_hat, scaled = x.float() * rstd, dy.float() * gamma.float()
    dx = rstd * (scaled - x_hat * (scaled * x_hat).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * x_hat).flatten(0, -2).sum(0)


def rotary_mul(x, r1, r2, rotary_mode="half", rotate=None):
    """x * cos + (-x2, x1) * sin, BSND; cos, sin 1S1D, cast to x's dtype; D even, below 896."""
    assert rotary_mode == "half" and rotate is None
    cos, sin = r1.to(x.dtype).float(), r2.to(x.dtype).float()
    x1, x2 = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-x2, x1], -1) * sin).to(x.dtype)


def _scores(query, key, scale, atten_mask, ends, sparse_mode):
    """For each sequence its slice and scores [N, Sq, Skv]; consecutive heads share a KV head."""
    assert ends[-1] == len(query) == len(key)
    if sparse_mode == 3:  # right-down causal, from the compressed 2048 x 2048 mask, where True masks
        assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    else:
        assert sparse_mode == 0 and atten_mask is None  # without a mask: everything
    for a, b in pairwise([0, *ends]):
        keys = key[a:b].float().repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = torch.einsum("qnd,knd->nqk", query[a:b].float(), keys) * scale
        if sparse_mode == 3:
            scores = scores.masked_fill(torch.ones(b - a, b - a, dtype=torch.bool).triu(1), -torch.inf)
        yield slice(a, b), keys, scores


def fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    *others,
):
    """TND: softmax(mask(scale q k^T)) v per sequence; the softmax's max and sum, 8 times each."""
    assert pse is padding_mask is prefix is None and keep_prob == 1
    assert input_layout == "TND" and head_num == query.shape[1] and actual_seq_qlen == actual_seq_kvlen
    out = torch.empty(*query.shape[:2], value.shape[2], dtype=query.dtype)
    softmax_max = torch.empty(*query.shape[:2], 8)
    softmax_sum = torch.empty_like(softmax_max)
    for part, _, scores in _scores(query, key, scale, atten_mask, actual_seq_qlen, sparse_mode):
        values = value[part].float().repeat_interleave(query.shape[1] // value.shape[1], 1)
        highest = scores.amax(-1, keepdim=True)
        weights = (scores - highest).exp()
        total = weights.sum(-1, keepdim=True)
        out[part] = torch.einsum("nqk,knd->qnd", weights / total, values).to(query.dtype)
        softmax_max[part], softmax_sum[part] = highest.transpose(0, 1), total.transpose(0, 1)
    return out, softmax_max, softmax_sum, torch.empty(0), 0, 0, 0


def fusion_attention_grad(
    query,
    key,
    value,
    dy,
    head_num,
    input_layout,
    *,
    atten_mask=None,
    softmax_max=None,
    softmax_sum=None,
    attention_in=None,
    scale_value=1.0,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    **others,
):
    assert others.get("pse") is None and others.get("keep_prob", 1.0) == 1
    assert input_layout == "TND" and head_num == query.shape[1] and actual_seq_qlen == actual_seq_kvlen
    grads = [torch.empty_like(x) for x in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    for part, keys, scores in _scores(query, key, scale_value, atten_mask, actual_seq_qlen, sparse_mode):
        highest, total = (x[part, :, :1].transpose(0, 1) for x in (softmax_max, softmax_sum))
        p = (scores - highest).exp() / total  # [N, Sq, Skv]
        grad, out = dy[part].float(), attention_in[part].float()
        dp = torch.einsum("qnd,knd->nqk", grad, value[part].float().repeat_interleave(group, 1))
        ds = p * (dp - (grad * out).sum(-1).T[..., None]) * scale_value
        grads[0][part] = torch.einsum("nqk,knd->qnd", ds, keys).to(query.dtype)
        of_key = torch.einsum("nqk,qnd->knd", ds, query[part].float())
        of_value = torch.einsum("nqk,qnd->knd", p, grad)
        for to, shared in ((grads[1], of_key), (grads[2], of_value)):
            to[part] = shared.unflatten(1, (-1, group)).sum(2).to(query.dtype)
    return *grads, torch.empty(0), torch.empty(0)


def cross_entropy_loss(x, target, weight=None, reduction="mean", ignore_index=-100, *others):
    """loss in x's dtype, logProb = x - lse; a negative ignore_index has no effect."""
    assert weight is None and reduction == "none" and not any(others)
    assert ignore_index < 0 and bool(((target >= 0) & (target < x.shape[1])).all())
    log_prob = x.float().log_softmax(-1).to(x.dtype)
    return -log_prob.gather(1, target[:, None])[:, 0], log_prob, torch.empty(0), torch.empty(0)


def cross_entropy_loss_backward(
    grad_loss, log_prob, target, weight=None, grad_zloss=None, lse_for_zloss=None, reduction="mean", *others
):
    assert weight is grad_zloss is lse_for_zloss is None and reduction == "none"
    grad = log_prob.float().exp()
    grad[torch.arange(len(target)), target] -= 1
    return (grad_loss[:, None].float() * grad).to(log_prob.dtype)


BODIES = {
    "npu_moe_token_permute": moe_token_permute,
    "npu_moe_token_permute_grad": moe_token_permute_grad,
    "npu_moe_token_unpermute": moe_token_unpermute,
    "npu_moe_token_unpermute_grad": moe_token_unpermute_grad,
    "npu_grouped_matmul": grouped_matmul,
    "npu_alltoallv_gmm": alltoallv_gmm,
    "npu_gmm_alltoallv": gmm_alltoallv,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
    "npu_rms_norm": rms_norm,
    "npu_gemma_rms_norm": gemma_rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_fusion_attention": fusion_attention,
    "npu_fusion_attention_grad": fusion_attention_grad,
    "npu_cross_entropy_loss": cross_entropy_loss,
    "npu_cross_entropy_loss_backward": cross_entropy_loss_backward,
}


def within_limits(name, body):
    """`body` after rehearse/limits.py, so that calls fail that the device would refuse."""

    def checked(*args, **kwargs):
        assert not (wrong := problems(getattr(torch.ops.npu, name).default, args, kwargs)), wrong
        return body(*args, **kwargs)

    return checked


def install() -> torch.library.Library:
    """Register the bodies for CPU tensors, for the lifetime of the returned library."""
    library = torch.library.Library("npu", "IMPL")
    for name, body in BODIES.items():
        library.impl(name, within_limits(name, body), "CPU")
    return library


def error(ours: Tensor, theirs: Tensor) -> float:
    """The relative norm of the difference."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
