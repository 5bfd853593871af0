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
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from kernels import KernelError, moe_parallel, npu

RANKS = (8, 16, 32, 64, 128)
MAX_EXPERTS, MAX_LOCAL_EXPERTS, TOP_K = 256, 32, range(2, 9)


class FusedExchange(moe_parallel.Exchange):
    """Dispatch and combine, each fused with the matmul after or before it."""

    @staticmethod
    def check(x: Tensor, top_k: int, ranks: int, local: int, adapted: bool) -> None:
        """Raises KernelError, on all ranks, if the operators do not take this."""
        for is_supported, problem in (
            (ranks in RANKS, f"parallel.expert_parallel_size {ranks} is not one of {', '.join(map(str, RANKS))}"),
            (local <= MAX_LOCAL_EXPERTS, f"{local} experts a rank are more than {MAX_LOCAL_EXPERTS}"),
            (ranks * local <= MAX_EXPERTS, f"{ranks * local} experts are more than {MAX_EXPERTS}"),
            (top_k in TOP_K, f"{top_k} experts a token are not {TOP_K[0]} to {TOP_K[-1]}"),
            (x.dtype in (torch.bfloat16, torch.float16), f"{x.dtype} is neither bfloat16 nor float16"),
            (len(x) > 0, "a rank has no tokens"),
            (not adapted, "the experts have adapters, which would be added between a matmul and its exchange"),
        ):
            if not is_supported:
                raise KernelError(
                    f"model.kernels.moe_experts_parallel=alltoallv_gmm does not take this: {problem}; auto takes it"
                )

    def dispatch_and_matmul(self, rows: Tensor, weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        away, local = self._counts()
        return npu.alltoallv_matmul(rows, weight, transposed, *self._group(), away, local)

    def matmul_and_combine(
        self, rows: Tensor, weight: Tensor, transposed: bool, add: Callable[[Tensor], Tensor]
    ) -> Callable[[], Tensor]:
        away, local = self._counts()
        product = npu.matmul_alltoallv(rows, weight, transposed, *self._group(), local, away)
        return lambda: product

    def _group(self) -> tuple[str, int]:
        return npu.communicator(self.group), len(self.routes.sent)

    def _counts(self) -> tuple[list[int], list[int]]:
        """Rows sent and rows received, by rank and its experts."""
        return [*chain(*self.routes.sent)], [*chain(*self.routes.received)]


moe_experts_parallel = partial(moe_parallel.moe_experts_parallel, primitives=npu, exchange=FusedExchange)
