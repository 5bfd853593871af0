"""What an operator costs an NPU: bytes through its memory, kernel launches, and workspace.

By default an operator reads its arguments once, writes what it returns or changes once, and
launches one kernel. The exceptions are in BYTES and LAUNCHES; those with a large workspace are in
WORKSPACES. A tensor counts by its elements in memory: an axis along which it is broadcast counts
once. Sources: op-plugin 7.3.0 (opapi), CANN's ops-nn 8.5.0 and ops-transformer (op_host, op_api),
torch's own FSDP.
"""

from collections.abc import Callable
from functools import cache, partial
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from rehearse.cluster import tensors_among

Given = dict[str, Any]  # an operator's arguments by name
MiB = 1 << 20
SYSTEM = 16 * MiB  # part of every workspace

# allocate or alias memory, without reading or writing it
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "record_stream")
# bound by arithmetic, which the model's FLOPs cover; matmul is an operator of op-plugin, not mm's.
# Of the first, those with a side below THIN are bound by memory: each byte serves fewer products
# than an NPU computes while it moves one (rates.py: 354 TFLOPS, 1.38 TB/s, in bf16).
MATMULS = ("mm", "bmm", "matmul", "addmm", "baddbmm", "_grouped_mm", "npu_grouped_matmul")
THIN = 256
ARITHMETIC = (
    *("npu_alltoallv_gmm", "npu_gmm_alltoallv", "npu_fusion_attention", "npu_fusion_attention_grad"),
    *("invert", "scan", "states", "grad_states", "gradients"),  # of the delta rule
)
FILLS = ("zeros", "ones", "full", "arange", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
GATHERS = ("embedding", "index", "index_select", "gather", "npu_moe_token_permute")
COLLECTIVES = ("c10d", "_c10d_functional")  # counted by rehearse/communication.py


def bytes_moved(func: torch._ops.OpOverload, args: tuple, kwargs: dict, made: list[Tensor]) -> int:
    """Bytes that the operator reads from device memory and writes to it; `made`: its results."""
    if func.is_view or func.namespace in COLLECTIVES:
        return 0
    given = named(func, args, kwargs)
    changed = [given[name] for name, is_written in _arguments(func).items() if is_written and name in given]
    arguments = {x.untyped_storage()._cdata for x in _tensors(*given.values())}
    new = [x for x in made if x.untyped_storage()._cdata not in arguments]
    if _name(func) in MATMULS and min(n for x in _factors(given) for n in x.shape[-2:]) >= THIN:
        return 0
    if rule := BYTES.get(_name(func)):
        return rule(given, new)
    read = [value for name, value in given.items() if name != "out"]
    return size_of(*read) + size_of(*changed) + size_of(*new)


def launches(func: torch._ops.OpOverload, args: tuple) -> int:
    """Kernels that the host launches. Raises NotImplementedError for unknown _foreach operators."""
    name = _name(func)
    if func.is_view or name in FREE:
        return 0
    if name.startswith(("_foreach", "_fused")) and name not in LAUNCHES:
        raise NotImplementedError(f"{func.name()}: rehearse/cost.py does not know how many kernels it launches")
    return ceil(len(args[0]) * LAUNCHES[name]) if name in LAUNCHES else 1


def workspace(func: torch._ops.OpOverload, args: tuple, kwargs: dict, made: list[Tensor]) -> int:
    """Bytes that the operator allocates beside its results; not in WORKSPACES: a few MB at most."""
    rule = WORKSPACES.get(_name(func))
    return rule(named(func, args, kwargs), made) if rule else 0


def named(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Given:
    return dict(zip(_arguments(func), args, strict=False)) | kwargs


@cache  # each look at a schema makes its objects anew, and a step has thousands of operators
def _arguments(func: torch._ops.OpOverload) -> dict[str, bool]:
    """Names -> whether the operator writes into it."""
    return {a.name: bool(a.alias_info and a.alias_info.is_write) for a in func._schema.arguments}


def size_of(*values: Any) -> int:
    """Bytes of the tensors that are on the device, in lists too; a repeated one counts once."""
    unique = {
        (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x
        for x in values
        if isinstance(x, Tensor)
    }
    found = _tensors(*unique.values(), *(value for value in values if not isinstance(value, Tensor)))
    return sum(
        prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n) * x.element_size()
        for x in found
    )


def _tensors(*values: Any) -> list[Tensor]:
    return [x for x in tensors_among(values) if x.device.type != "cpu"]


@cache
def _name(func: torch._ops.OpOverload) -> str:
    """Without namespace, overload, and the underscore of in-place variants."""
    return func._schema.name.partition("::")[2].rstrip("_")


def _factors(given: Given) -> list[Tensor]:
    """A matmul's two; what it adds to their product, and where groups end, is neither."""
    pairs = ("mat1", "mat2"), ("batch1", "batch2"), ("self", "mat2"), ("self", "other"), ("x", "weight")
    left, right = next(pair for pair in pairs if given.keys() >= {*pair})
    return _tensors(given[left], given[right])


# ── Bytes ───────────────────────────────────────────────────────────────────────────────────────


def _gathered(given: Given, new: list[Tensor]) -> int:
    """As much of the first argument is read as the first result holds."""
    _, *others = given.values()
    return size_of(new[0]) + size_of(*new) + size_of(*others)


def _scattered(given: Given, new: list[Tensor], adds: bool = False) -> int:
    """Rows are written, and read first if added to. Out of place, `self` is copied first."""
    target, index = given["self"], given["indices"] if "indices" in given else given["index"]
    source = given.get("source", given.get("src", given.get("values")))
    if isinstance(index, list | tuple):  # index_put: each position of the indices is a row
        positions = torch.broadcast_shapes(*(i.shape for i in index if i is not None))
        rows = prod((*positions, *target.shape[len(index) :])) * target.element_size()
    else:
        rows = (source if isinstance(source, Tensor) else index).numel() * target.element_size()
    adds = adds or bool(given.get("accumulate"))
    return size_of(index) + size_of(source) + rows * (1 + adds) + 2 * size_of(new)


def _adamw(given: Given, new: list[Tensor]) -> int:
    """Parameters and moments are read and written; gradients and steps are read alone."""
    changed = size_of(given["self"], given["exp_avgs"], given["exp_avg_sqs"])
    return 2 * changed + size_of(given["grads"], given["state_steps"])


# operator -> its bytes, from its arguments by name (a) and its new results
BYTES: dict[str, Callable[[Given, list[Tensor]], int]] = {
    **dict.fromkeys((*FREE, *ARITHMETIC), lambda a, new: 0),
    # nothing is read, even where the result is like an argument
    **dict.fromkeys((*FILLS, "fill", "zero"), lambda a, new: size_of(new or a.get("self"))),
    # the target is not read; for copies from or to the host, the device's side counts
    **dict.fromkeys(("copy", "_foreach_copy"), lambda a, new: size_of(a["src"]) + size_of(a["self"])),
    **dict.fromkeys(GATHERS, _gathered),
    **dict.fromkeys(("scatter", "index_put"), _scattered),
    **dict.fromkeys(("scatter_add", "index_add"), partial(_scattered, adds=True)),
    # only the shapes of `tokens` and `indices` are used
    "npu_moe_token_permute_grad": lambda a, new: size_of(a["grad_permuted_tokens"], a["sorted_indices"], *new),
    # a workspace like the result is zeroed, updated row by row, and copied into the result
    "embedding_dense_backward": lambda a, new: 3 * size_of(a["grad_output"], *new) + size_of(a["indices"]),
    "_fused_adamw": _adamw,
    # FSDP's shards are copied into the buffer, of which both results are views
    "all_gather_copy_in": lambda a, new: 2 * size_of(a["all_gather_inputs"]),
}

# ── Launches ────────────────────────────────────────────────────────────────────────────────────

LAUNCHES = {  # kernels for each tensor of the first argument
    "_fused_adamw": 2,  # a loop over the parameters: step minus one, then ApplyAdamWV2
    "_foreach_mul": 1,  # no kernel takes a scalar on the device: torch multiplies tensor by tensor
    "_foreach_norm": 1 / 24,  # 24 tensors in a launch, and so on
    "_foreach_sub": 1 / 24,
    "_foreach_add": 1 / 48,
    "_foreach_copy": 1 / 48,
    "all_gather_copy_in": 1 / 48,  # a _foreach_copy_
}

# ── Workspaces ──────────────────────────────────────────────────────────────────────────────────


def _attention_grad(given: Given, made: list[Tensor]) -> int:
    """Gradients are accumulated in fp32 (flash_attention_score_grad_tiling_*.cpp)."""
    return SYSTEM + 4 * sum(given[name].numel() for name in ("query", "key", "value"))


def _embedding_grad(given: Given, made: list[Tensor]) -> int:
    """A buffer like the result, and more in two cases.

    Small ones: buffer and gradient are fp32 (aclnn_embedding_dense_backward.cpp, IsNeedCast).
    Short rows: one more fp32 buffer (embedding_dense_grad_v2_tiling.cpp, CalcWorkSpaceSize).
    """
    grad, [out] = given["grad_output"], made
    width = grad.shape[-1]
    if 2 * (grad.numel() + out.numel()) < 100 * MiB or grad.numel() // max(1, width) < 512:
        return SYSTEM + 4 * (out.numel() + (grad.dtype != torch.float32) * grad.numel())
    third = 4 * out.numel() if grad.dtype != torch.float32 and width <= 512 else 0
    return SYSTEM + out.numel() * grad.element_size() + third


WORKSPACES: dict[str, Callable[[Given, list[Tensor]], int]] = {
    "npu_fusion_attention_grad": _attention_grad,
    "embedding_dense_backward": _embedding_grad,
    # the sort needs six int32 for each index (moe_token_permute_tiling.cpp)
    "npu_moe_token_permute": lambda a, made: SYSTEM + 24 * a["indices"].numel(),
}
