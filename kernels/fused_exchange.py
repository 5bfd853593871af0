"""moe_experts_parallel on an NPU with all-to-all and grouped matmul fused into one operator.

Selected by model.kernels.moe_experts_parallel=alltoallv_gmm; `auto` does not choose it, because its
operators are limited: Atlas A3; 8, 16, 32, 64 or 128 ranks; at most 32 experts per rank and 256 in
all; 2 to 8 experts per token; bf16 or fp16. Below 2 MB per rank and exchange it may be slow.

npu_alltoallv_gmm dispatches and multiplies, npu_gmm_alltoallv multiplies and combines; each serves
in the backward of the other. They carry rows only: the routing weights and their gradients go by
plain all-to-all. Source: op-plugin's documentation of both operators (it recommends them for
inference; MindSpeed trains with them); for the order of counts and rows
aclnnGroupedMatMulAlltoAllvV2 in CANN's ops-transformer.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_world_size

from kernels import KernelError, moe_parallel, npu
from kernels.moe_parallel import Exchange
from kernels.recompute_cache import RecomputeCache

RANKS = (8, 16, 32, 64, 128)
MAX_EXPERTS, MAX_LOCAL_EXPERTS, TOP_K = 256, 32, range(2, 9)


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
    """As moe_parallel.moe_experts_parallel. Raises KernelError, on all ranks, on other inputs."""
    ranks, local, top_k = get_world_size(group), len(gate_up_proj), topk_ids.shape[1]
    for is_supported, problem in (
        (ranks in RANKS, f"parallel.expert_parallel_size {ranks} is not one of {', '.join(map(str, RANKS))}"),
        (local <= MAX_LOCAL_EXPERTS, f"{local} experts a rank are more than {MAX_LOCAL_EXPERTS}"),
        (ranks * local <= MAX_EXPERTS, f"{ranks * local} experts are more than {MAX_EXPERTS}"),
        (top_k in TOP_K, f"{top_k} experts a token are not {TOP_K[0]} to {TOP_K[-1]}"),
        (x.dtype in (torch.bfloat16, torch.float16), f"{x.dtype} is neither bfloat16 nor float16"),
        (len(x) > 0, "a rank has no tokens"),
    ):
        if not is_supported:
            raise KernelError(
                f"model.kernels.moe_experts_parallel=alltoallv_gmm does not take this: {problem}; auto takes it"
            )
    return moe_parallel.moe_experts_parallel(
        x, topk_ids, topk_weights, gate_up_proj, down_proj, group, recompute_cache, npu, count_reader, FusedExchange
    )


class FusedExchange(Exchange):
    """Dispatch and combine, each fused with the matmul after or before it."""

    def dispatch_and_matmul(self, rows: Tensor, weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        away, local = self._counts()
        return npu.alltoallv_matmul(rows, weight, transposed, *self._group(), away, local)

    def matmul_and_combine(self, rows: Tensor, weight: Tensor, transposed: bool) -> Callable[[], Tensor]:
        away, local = self._counts()
        product = npu.matmul_alltoallv(rows, weight, transposed, *self._group(), local, away)
        return lambda: product

    def _group(self) -> tuple[str, int]:
        return npu.communicator(self.group), get_world_size(self.group)

    def _counts(self) -> tuple[list[int], list[int]]:
        """Rows sent and rows received, by rank and its experts."""
        return [*chain(*self.routes.sent)], [*chain(*self.routes.received)]
