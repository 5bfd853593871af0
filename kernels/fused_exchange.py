"""moe_experts_parallel on an NPU with npu_alltoallv_gmm and npu_gmm_alltoallv: exchange and grouped matmul as one operator.

Asked for by name, model.kernels.moe_experts_parallel=alltoallv_gmm, and not what `auto` means, for its limits are narrow: Atlas
A3 alone; 8, 16, 32, 64 or 128 ranks; at most 32 experts a rank and 256 in all; 2 to 8 of them a token; bf16 or fp16. Below 2 MB
a rank and exchange it may be slow. Source: op-plugin's documentation of both operators (which names inference as their use;
MindSpeed trains with them), and of the order of counts and rows CANN's ops-transformer, aclnnGroupedMatMulAlltoAllvV2.

One is the other's backward: out and gate_up, down and back; then out and down, gate_up and back. What the operators carry
are rows; the rows' weights and their gradients, a number each, go by plain all-to-alls.
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
MOST_EXPERTS, MOST_HERE, CHOICES = 256, 32, range(2, 9)


def moe_experts_parallel(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    group: ProcessGroup,
    recompute_cache: RecomputeCache | None = None,
    sizes: moe_parallel.Sizes = moe_parallel.read,
) -> Tensor:
    """As moe_parallel.moe_experts_parallel. Raises KernelError on what the operators do not take, on every rank alike."""
    ranks, here, top_k = get_world_size(group), len(gate_up_proj), topk_ids.shape[1]
    for is_taken, what in (
        (ranks in RANKS, f"parallel.expert_parallel_size {ranks} is not one of {', '.join(map(str, RANKS))}"),
        (here <= MOST_HERE, f"{here} experts a rank are more than {MOST_HERE}"),
        (ranks * here <= MOST_EXPERTS, f"{ranks * here} experts are more than {MOST_EXPERTS}"),
        (top_k in CHOICES, f"{top_k} experts a token are not {CHOICES[0]} to {CHOICES[-1]}"),
        (x.dtype in (torch.bfloat16, torch.float16), f"{x.dtype} is neither bfloat16 nor float16"),
        (len(x) > 0, "a rank has no tokens"),
    ):
        if not is_taken:
            raise KernelError(
                f"model.kernels.moe_experts_parallel=alltoallv_gmm does not take this: {what}; auto takes it"
            )
    return moe_parallel.moe_experts_parallel(
        x, topk_ids, topk_weights, gate_up_proj, down_proj, group, recompute_cache, npu, sizes, FusedExchange
    )


class FusedExchange(Exchange):
    """Rows to their experts and back, each with the matmul that follows or goes before."""

    def out_and_matmul(self, rows: Tensor, weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        away, here = self._counts()
        return npu.alltoallv_matmul(rows, weight, transposed, *self._group(), away, here)

    def matmul_and_back(self, rows: Tensor, weight: Tensor, transposed: bool) -> Callable[[], Tensor]:
        away, here = self._counts()
        product = npu.matmul_alltoallv(rows, weight, transposed, *self._group(), here, away)
        return lambda: product

    def _group(self) -> tuple[str, int]:
        return npu.communicator(self.group), get_world_size(self.group)

    def _counts(self) -> tuple[list[int], list[int]]:
        """By rank and its experts: of this rank's rows, of those that come."""
        return [*chain(*self.routes.sent)], [*chain(*self.routes.received)]
