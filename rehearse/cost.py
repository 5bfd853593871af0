"""What an operator costs an NPU: bytes through its memory, launches, and the memory that it needs inside while it runs.

Bytes: what an operator is given is read once, what it returns or changes is written once; operators of which that is not true
are in BYTES, those that start more or less than one kernel in LAUNCHES, those with a large workspace in WORKSPACES. A tensor
counts by its elements in memory: an axis along which it is broadcast counts once. Read for this: op-plugin 7.3.0 (opapi),
CANN's ops-nn 8.5.0 and ops-transformer (op_host, op_api), torch's own FSDP.
"""

from collections.abc import Callable
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Given = dict[str, Any]  # an operator's arguments by name
MiB = 1 << 20
SYSTEM = 16 * MiB  # of the workspace, whatever the operator

# memory that nobody has written yet, or no memory at all
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "record_stream")
# bound by arithmetic, which the model's FLOPs stand for. To op-plugin matmul is an operator, and is not made of mm
MATMULS = (
    *("mm", "bmm", "matmul", "addmm", "baddbmm", "_grouped_mm", "npu_grouped_matmul", "npu_alltoallv_gmm"),
    *("npu_gmm_alltoallv", "npu_fusion_attention", "npu_fusion_attention_grad"),
    *("invert", "scan", "states", "grad_states", "gradients"),  # of the delta rule
)
FILLS = ("zeros", "ones", "full", "arange", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
GATHERS = ("embedding", "index", "index_select", "gather", "npu_moe_token_permute")
WIRE = ("c10d", "_c10d_functional")  # counted by rehearse/communication.py


def moved(func: torch._ops.OpOverload, args: tuple, kwargs: dict, made: list[Tensor]) -> int:
    """Bytes that the operator reads from the device's memory and writes into it; `made` is what it returned."""
    if func.is_view or func.namespace in WIRE:
        return 0
    given = named(func, args, kwargs)
    changed = [
        given[a.name] for a in func._schema.arguments if a.alias_info and a.alias_info.is_write and a.name in given
    ]
    inside = {x.untyped_storage()._cdata for x in _tensors(*given.values())}
    new = [x for x in made if x.untyped_storage()._cdata not in inside]
    if rule := BYTES.get(_name(func)):
        return rule(given, new)
    read = [value for name, value in given.items() if name != "out"]
    return size_of(*read) + size_of(*changed) + size_of(*new)


def launches(func: torch._ops.OpOverload, args: tuple) -> int:
    """Kernels that the host starts. Raises NotImplementedError for an operator on lists that nobody has looked at."""
    name = _name(func)
    if func.is_view or name in FREE:
        return 0
    if name.startswith(("_foreach", "_fused")) and name not in LAUNCHES:
        raise NotImplementedError(f"{func.name()}: how many kernels it starts is not known here (rehearse/cost.py)")
    return ceil(len(args[0]) * LAUNCHES[name]) if name in LAUNCHES else 1


def workspace(func: torch._ops.OpOverload, args: tuple, kwargs: dict, made: list[Tensor]) -> int:
    """Bytes that the operator asks for beside its arguments; of those that are not in WORKSPACES a few MB at the most."""
    rule = WORKSPACES.get(_name(func))
    return rule(named(func, args, kwargs), made) if rule else 0


def named(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Given:
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs


def size_of(*values: Any) -> int:
    """Bytes in memory of the tensors on the device among them, those in lists too; one that is given twice is read once."""
    alone = {
        (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x
        for x in values
        if isinstance(x, Tensor)
    }
    found = _tensors(*alone.values(), *(value for value in values if not isinstance(value, Tensor)))
    return sum(
        prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n) * x.element_size()
        for x in found
    )


def _tensors(*values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.device.type != "cpu"]


def _name(func: torch._ops.OpOverload) -> str:
    """Without namespace and overload, the same in place and not."""
    return func._schema.name.partition("::")[2].rstrip("_")


# ── Bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _nothing(given: Given, new: list[Tensor]) -> int:
    return 0


def _filled(given: Given, new: list[Tensor]) -> int:
    """Nothing is read, whatever the result is to be like."""
    return size_of(new or given.get("self"))


def _copied(given: Given, new: list[Tensor]) -> int:
    """What stood there before is not read. Of a copy from or to the host, the device's side counts."""
    return size_of(given["src"]) + size_of(given["self"])


def _gathered(given: Given, new: list[Tensor]) -> int:
    """Of the first argument as much is read as there is in the first result."""
    _, *others = given.values()
    return size_of(new[0]) + size_of(*new) + size_of(*others)


def _scattered(given: Given, new: list[Tensor], adds: bool = False) -> int:
    """Rows are written; what they are added to is read before. Where `self` is to stay as it is, all of it is copied first."""
    target, index = given["self"], given["indices"] if "indices" in given else given["index"]
    source = given.get("source", given.get("src", given.get("values")))
    if isinstance(index, list | tuple):  # index_put: each place of the indices is a row
        places = torch.broadcast_shapes(*(i.shape for i in index if i is not None))
        rows = prod((*places, *target.shape[len(index) :])) * target.element_size()
    else:
        rows = (source if isinstance(source, Tensor) else index).numel() * target.element_size()
    adds = adds or bool(given.get("accumulate"))
    return size_of(index) + size_of(source) + rows * (1 + adds) + 2 * size_of(new)


def _permuted_back(given: Given, new: list[Tensor]) -> int:
    """Of `tokens` and `indices` the shapes alone are used."""
    return size_of(given["grad_permuted_tokens"]) + size_of(given["sorted_indices"]) + size_of(new)


def _embedding_backward(given: Given, new: list[Tensor]) -> int:
    """Into a workspace like the result: zeroed, each row read and written as a gradient is added, copied into the result."""
    return 3 * size_of(given["grad_output"]) + size_of(given["indices"]) + 3 * size_of(new)


def _adamw(given: Given, new: list[Tensor]) -> int:
    """The parameter and its moments are read and written, gradient and step read; the schema says that all may change."""
    changed = size_of(given["self"], given["exp_avgs"], given["exp_avg_sqs"])
    return 2 * changed + size_of(given["grads"], given["state_steps"])


def _copied_in(given: Given, new: list[Tensor]) -> int:
    """FSDP's shards go to their place in the buffer, of which both results are views."""
    return 2 * size_of(given["all_gather_inputs"])


BYTES: dict[str, Callable[[Given, list[Tensor]], int]] = {
    **dict.fromkeys((*FREE, *MATMULS), _nothing),
    **dict.fromkeys((*FILLS, "fill", "zero"), _filled),
    **dict.fromkeys(("copy", "_foreach_copy"), _copied),
    **dict.fromkeys(GATHERS, _gathered),
    **dict.fromkeys(("scatter", "index_put"), _scattered),
    **dict.fromkeys(("scatter_add", "index_add"), partial(_scattered, adds=True)),
    "npu_moe_token_permute_grad": _permuted_back,
    "embedding_dense_backward": _embedding_backward,
    "_fused_adamw": _adamw,
    "all_gather_copy_in": _copied_in,
}

# ── Launches ───────────────────────────────────────────────────────────────────────────────────────────────────────────

LAUNCHES = {  # of each tensor in the first argument
    "_fused_adamw": 2,  # a loop over the parameters: the step less one, then ApplyAdamWV2
    "_foreach_mul": 1,  # with a scalar on the device there is no kernel: torch multiplies one by one
    "_foreach_norm": 1 / 24,  # so many in a call, and so on
    "_foreach_sub": 1 / 24,
    "_foreach_add": 1 / 48,
    "_foreach_copy": 1 / 48,
    "all_gather_copy_in": 1 / 48,  # a _foreach_copy_
}

# ── Workspaces ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _attention_grad(given: Given, made: list[Tensor]) -> int:
    """The gradients of query, key and value are summed up in fp32 (flash_attention_score_grad_tiling_*.cpp)."""
    return SYSTEM + 4 * sum(given[name].numel() for name in ("query", "key", "value"))


def _embedding_grad(given: Given, made: list[Tensor]) -> int:
    """A second result; in fp32, with the gradient in fp32 beside it, where these are small (aclnn_embedding_dense_backward.cpp,
    IsNeedCast), and with a third in fp32 for short rows (embedding_dense_grad_v2_tiling.cpp, CalcWorkSpaceSize)."""
    grad, [out] = given["grad_output"], made
    width = grad.shape[-1]
    if 2 * (grad.numel() + out.numel()) < 100 * MiB or grad.numel() // max(1, width) < 512:
        return SYSTEM + 4 * (out.numel() + (grad.dtype != torch.float32) * grad.numel())
    inside = 4 * out.numel() if grad.dtype != torch.float32 and width <= 512 else 0
    return SYSTEM + out.numel() * grad.element_size() + inside


def _permuted(given: Given, made: list[Tensor]) -> int:
    """For the sort, six numbers of each index (moe_token_permute_tiling.cpp)."""
    return SYSTEM + 24 * given["indices"].numel()


WORKSPACES: dict[str, Callable[[Given, list[Tensor]], int]] = {
    "npu_fusion_attention_grad": _attention_grad,
    "embedding_dense_backward": _embedding_grad,
    "npu_moe_token_permute": _permuted,
}
