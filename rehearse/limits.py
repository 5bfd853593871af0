"""What the operators of an Ascend 910B refuse: dtypes, shapes, strides, devices of arguments.

One function for each operator yields what is wrong with a call, and names its source: pages are in
op-plugin's docs/zh/custom_APIs/torch_npu, aclnn pages and op_api in CANN's ops-nn, ops-math and
ops-transformer. What is only in the pages of other devices is not refused: rows of the gradient of
swiglu that are no multiples of 64 bytes (Ascend 310P alone, swi_glu_tiling.cpp of ops-nn). Nor are
strided arguments of the norms, which their pages allow.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rehearse.cluster import tensors_among
from rehearse.cost import COLLECTIVES, named

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.int32, torch.int64)
Problems = Iterator[str]


def problems(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """What the device would refuse in this call, one line for each reason."""
    name = func.name()
    rule = RULES.get(name.partition(".")[0])
    if func.namespace in COLLECTIVES:
        rule = partial(_collective, reduces="reduce" in name)
    if rule is None:
        return []
    whole = {a.name: a.default_value for a in func._schema.arguments} | named(func, args, kwargs)
    whole.setdefault("input", whole.get("self"))  # its name depends on the release of torch_npu
    return [f"{name}: {problem}" for problem in rule(SimpleNamespace(**whole))]


def _dtypes(allowed: Iterable[torch.dtype], **tensors: Tensor | None) -> Problems:
    for name, x in tensors.items():
        if x is not None and x.dtype not in tuple(allowed):
            yield f"{name} is {x.dtype}"


def _if(*rules: tuple[bool, str]) -> Problems:
    return (problem for is_wrong, problem in rules if is_wrong)


def _attention(a: SimpleNamespace) -> Problems:  # torch_npu-npu_fusion_attention.md
    """TND, and BNSD, which torch_npu makes of scaled_dot_product_attention."""
    q, k, v, mask, is_packed = a.query, a.key, a.value, a.atten_mask, a.input_layout == "TND"
    heads, size, ends = q.shape[1], q.shape[-1], a.actual_seq_qlen or []
    yield from _dtypes(FLOATS, query=q)
    yield from _dtypes((torch.bool, torch.uint8), atten_mask=mask)
    yield from _if(
        (not q.dtype == k.dtype == v.dtype, f"query {q.dtype}, key {k.dtype}, value {v.dtype}"),
        (not q.ndim == k.ndim == v.ndim == (3 if is_packed else 4), f"axes of {a.input_layout}"),
        (not 0 < heads <= 256 or heads % k.shape[1] != 0, f"{heads} query heads over {k.shape[1]}"),
        (not size == k.shape[-1] >= v.shape[-1], "heads of query and key differ, or those of value are larger"),
        (size > (512 if "dy" in vars(a) else 768), f"heads of {size}"),
        (max(q.shape[0], q.shape[-2]) > 2**20, f"{max(q.shape[0], q.shape[-2])} tokens"),
        (is_packed and not 0 < len(ends) <= 1024, f"{len(ends)} sequences in one call"),
        (any(x > y for x, y in pairwise(ends)), "ends of sequences that decrease"),
        (a.sparse_mode == 3 and (mask is None or mask.shape != (2048, 2048)), "mask of sparse_mode 3"),
    )
    if mask is not None and a.sparse_mode == 0 and not is_packed:  # op-plugin broadcasts it from 26.1 on
        B, *pair = q.shape[0], q.shape[-2], k.shape[-2]
        allowed = ([*pair], [1, 1, *pair], [B, 1, *pair], [B, heads, *pair])
        yield from _if(([*mask.shape] not in allowed, f"a mask {[*mask.shape]}, none of {[*allowed]}"))


def _attention_grad(a: SimpleNamespace) -> Problems:  # aclnnFlashAttentionUnpaddingScoreGrad.md
    yield from _attention(a)
    stats = (*a.query.shape[:2], 8)
    yield from _dtypes([torch.float32], softmax_max=a.softmax_max, softmax_sum=a.softmax_sum)
    yield from _if(
        (a.dy.shape != a.attention_in.shape or a.dy.dtype != a.query.dtype, "dy is not like the output"),
        (not tuple(a.softmax_max.shape) == tuple(a.softmax_sum.shape) == stats, "statistics are not [T, N, 8]"),
    )


def _grouped_matmul(a: SimpleNamespace) -> Problems:  # torch_npu-npu_grouped_matmul.md
    x, weight, groups, by_rows = a.x[0], a.weight[0], a.group_list, a.group_type == 0
    inner = [t.shape[-1 if t.is_contiguous() else -2] for t in (x, weight)]  # the last axes in memory
    yield from _dtypes(FLOATS, x=x)
    yield from _dtypes([torch.int64], group_list=groups)
    yield from _if(
        (x.dtype != weight.dtype, f"x {x.dtype}, weight {weight.dtype}"),
        ((a.split_item, a.group_type) not in ((2, 0), (3, 0), (2, 2), (3, 2)), "split_item and group_type"),
        ((x.ndim, weight.ndim) != (2, 3 if by_rows else 2), f"{x.ndim} axes of x and {weight.ndim} of weight"),
        (groups.ndim != 1 or not 0 < len(groups) <= 1024, f"{len(groups)} groups"),
        (groups.device != x.device, f"group_list is on {groups.device}"),
        (by_rows and not x.is_contiguous(), "the rows of x are not contiguous"),
        (not by_rows and not x.mT.is_contiguous(), "x is not the transposed view of its rows"),
        (not (weight.is_contiguous() or (by_rows and weight.mT.is_contiguous())), "weight is a strided view"),
        (max(inner) > 65535, f"an inner axis of {max(inner)}"),
    )


def _permute(a: SimpleNamespace) -> Problems:  # aclnnMoeTokenPermute.md
    yield from _dtypes((*FLOATS, torch.int8), tokens=a.tokens)
    yield from _dtypes(INTEGERS, indices=a.indices)
    yield from _if(
        (a.tokens.ndim != 2 or a.indices.ndim != 2 or len(a.tokens) != len(a.indices), "shapes"),
        (a.indices.shape[-1] > 512, f"top_k of {a.indices.shape[-1]}"),
    )


def _permute_grad(a: SimpleNamespace) -> Problems:  # aclnnMoeTokenPermuteGrad.md
    yield from _dtypes(FLOATS, tokens=a.tokens)
    yield from _dtypes([torch.int32], sorted_indices=a.sorted_indices)
    yield from _if(
        (a.indices.ndim != 2 or a.indices.shape[-1] > 512, f"indices {list(a.indices.shape)}"),
        (a.sorted_indices.ndim != 1 or len(a.sorted_indices) != a.indices.numel(), "sorted_indices' length"),
        (a.grad_permuted_tokens.dtype != a.tokens.dtype, "the gradient's dtype is not the tokens'"),
    )


def _unpermute(a: SimpleNamespace) -> Problems:  # aclnnMoeTokenUnpermute.md
    yield from _dtypes(FLOATS, permuted_tokens=a.permuted_tokens, probs=a.probs)
    yield from _dtypes([torch.int32], sorted_indices=a.sorted_indices)
    yield from _if(
        (a.sorted_indices.ndim != 1 or len(a.sorted_indices) != a.probs.numel(), "sorted_indices' length"),
        (a.probs.shape[-1] > 512, f"top_k of {a.probs.shape[-1]}"),
    )


def _unpermute_grad(a: SimpleNamespace) -> Problems:  # aclnnMoeTokenUnpermuteGrad.md
    grad, rows = a.grad_unpermuted_tokens, a.permuted_tokens
    yield from _unpermute(a)
    yield from _if(
        (grad.dtype != rows.dtype, "the gradient's dtype is not the tokens'"),
        (len(rows) != a.probs.numel() or grad.shape != (len(a.probs), *rows.shape[1:]), "shapes"),
    )


def _swiglu(a: SimpleNamespace) -> Problems:  # （beta）torch_npu-npu_swiglu.md
    x = a.input
    yield from _dtypes(FLOATS, x=x)
    yield from _if(
        (x.shape[a.dim] % 2 != 0, f"an axis of {x.shape[a.dim]}"),
        (not x.is_contiguous() or not x.numel(), "strided or empty"),
    )


def _swiglu_backward(a: SimpleNamespace) -> Problems:  # aclnnSwiGluGrad.md
    x, grad = a.input, a.grad_output
    yield from _swiglu(a)
    yield from _if(
        (grad.dtype != x.dtype or not grad.is_contiguous(), "the gradient's dtype or strides"),
        (2 * grad.numel() != x.numel(), f"a gradient {list(grad.shape)} for {list(x.shape)}"),
    )


def _norm(a: SimpleNamespace) -> Problems:  # （beta）torch_npu-npu_rms_norm.md, aclnnRmsNorm.md
    x, gamma = a.input, a.gamma
    yield from _dtypes(FLOATS, input=x)
    yield from _if(
        (gamma.dtype not in (x.dtype, torch.float32), f"gamma is {gamma.dtype} for {x.dtype}"),
        (not 1 <= x.ndim <= 8 or x.shape[x.ndim - gamma.ndim :] != gamma.shape, "gamma's shape"),
    )


def _gemma_norm(a: SimpleNamespace) -> Problems:  # aclnnGemmaRmsNorm.md
    yield from _norm(a)
    yield from _if((a.gamma.dtype != a.input.dtype, "gamma's dtype is not the input's"))


def _norm_backward(a: SimpleNamespace) -> Problems:  # aclnnRmsNormGrad.md
    x, rest = a.input, a.input.shape[: a.input.ndim - a.gamma.ndim]
    yield from _norm(a)
    yield from _dtypes([torch.float32], rstd=a.rstd)
    yield from _if(
        (a.dy.dtype != x.dtype or a.dy.shape != x.shape, "dy is not like the input"),
        (tuple(a.rstd.shape) != (*rest, *(1 for _ in a.gamma.shape)), f"rstd's shape {list(a.rstd.shape)}"),
    )


def _rotary(a: SimpleNamespace) -> Problems:  # torch_npu-npu_rotary_mul.md, aclnnRotaryPositionEmbedding.md
    x = a.input
    yield from _dtypes(FLOATS, input=x)
    yield from _dtypes([x.dtype], r1=a.r1, r2=a.r2)
    yield from _if(
        (x.ndim != 4 or tuple(a.r1.shape) != (1, x.shape[1], 1, x.shape[3]) or a.r1.shape != a.r2.shape, "broadcast"),
        (x.shape[-1] % 2 != 0 or x.shape[-1] >= 896, f"heads of {x.shape[-1]}"),
        (x.shape[0] >= 1000 or x.shape[-2] >= 1000, f"{x.shape[-2]} heads of {x.shape[0]} samples"),
    )


def _cross_entropy(a: SimpleNamespace) -> Problems:  # torch_npu-npu_cross_entropy_loss.md
    yield from _dtypes(FLOATS, input=a.input)
    yield from _dtypes([torch.int64], target=a.target)
    yield from _if(
        (a.input.ndim != 2 or a.target.shape != a.input.shape[:1], "shapes"),
        (not 0 < len(a.input) <= 200_000, f"{len(a.input)} rows"),
        (a.label_smoothing != 0, "label_smoothing"),
    )


def _cross_entropy_backward(a: SimpleNamespace) -> Problems:  # aclnnCrossEntropyLossGrad.md
    yield from _dtypes(FLOATS, log_prob=a.log_prob)
    yield from _dtypes([torch.int64], target=a.target)
    yield from _dtypes([a.log_prob.dtype], grad_loss=a.grad_loss)


def _adamw(a: SimpleNamespace) -> Problems:  # FusedAdamWKernelNpuOpApi.cpp of op-plugin
    lists = (a.input, a.grads, a.exp_avgs, a.exp_avg_sqs, a.state_steps)
    yield from _if(
        (len(set(map(len, lists))) != 1, "lists of different lengths"),
        (any(s.device != p.device for s, p in zip(a.state_steps, a.input, strict=False)), "steps on the host"),
    )


def _cumsum(a: SimpleNamespace) -> Problems:  # AICORE910B_DTYPE_SUPPORT_LIST, op_api/cumsum.cpp of ops-math
    if (dtype := a.dtype or a.input.dtype) not in (*FLOATS, torch.int32):
        yield f"of {dtype} runs on the AI CPU"


def _sort(a: SimpleNamespace) -> Problems:  # op_api/sort.cpp of ops-math
    if a.input.dtype not in FLOATS:
        yield f"of {a.input.dtype} runs on the AI CPU"


def _scatter(a: SimpleNamespace) -> Problems:  # ScatterElementsV2 of ops-nn is parallel over all axes but the last
    if a.index.ndim == 1:
        yield f"of one axis writes {len(a.index)} values one by one"


def _histc(a: SimpleNamespace) -> Problems:  # HistcKernelNpuOpApi.cpp of op-plugin, aclnnHistc.md
    yield from _dtypes((torch.float32, torch.float16, *INTEGERS), input=a.input)
    yield from _if((a.min == a.max, "without bounds waits for the device"))


def _collective(a: SimpleNamespace, reduces: bool) -> Problems:
    """ProcessGroupHCCL.cpp of torch_npu, checkSupportedDataTypeOfAllReduce."""
    copied = () if reduces else (torch.uint8, torch.bool, torch.float64)
    for tensor in tensors_among(vars(a).values()):
        yield from _dtypes((*FLOATS, torch.int8, torch.int16, *INTEGERS, *copied), tensor=tensor)
        yield from _if((not tensor.is_contiguous(), f"a strided tensor {list(tensor.shape)}"))


RULES: dict[str, Callable[[SimpleNamespace], Problems]] = {
    **dict.fromkeys([f"npu::npu_fusion_attention{version}" for version in ("", "_v2", "_v3")], _attention),
    "npu::npu_fusion_attention_grad": _attention_grad,
    "npu::npu_grouped_matmul": _grouped_matmul,
    "npu::npu_moe_token_permute": _permute,
    "npu::npu_moe_token_permute_grad": _permute_grad,
    "npu::npu_moe_token_unpermute": _unpermute,
    "npu::npu_moe_token_unpermute_grad": _unpermute_grad,
    "npu::npu_swiglu": _swiglu,
    "npu::npu_swiglu_backward": _swiglu_backward,
    "npu::npu_rms_norm": _norm,
    "npu::npu_gemma_rms_norm": _gemma_norm,
    "npu::npu_rms_norm_backward": _norm_backward,
    "npu::npu_rotary_mul": _rotary,
    "npu::npu_cross_entropy_loss": _cross_entropy,
    "npu::npu_cross_entropy_loss_backward": _cross_entropy_backward,
    "aten::_fused_adamw_": _adamw,
    "aten::cumsum": _cumsum,
    "aten::sort": _sort,
    "aten::histc": _histc,
    **dict.fromkeys([f"aten::scatter{suffix}" for suffix in ("", "_", "_add", "_add_")], _scatter),
}
