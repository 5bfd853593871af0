"""Expert parallelism: each rank of a group holds some of the experts whole, and computes the tokens of all ranks for them."""

from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from kernels.recompute_cache import RecomputeCache
from qwen35.model.moe import Experts, MoE


class ParallelExperts(nn.Module):
    """In the place of `Experts`: the same parameters under the same names, of which this rank owns its experts' part."""

    def __init__(self, experts: Experts, mesh: DeviceMesh):
        """mesh: [ep], whose size divides the number of experts; the weights may be on the meta device."""
        super().__init__()
        self.gate_up_proj = local_experts(experts.gate_up_proj, mesh)
        self.down_proj = local_experts(experts.down_proj, mesh)
        self.kernel, self.group = experts.parallel_kernel, mesh.get_group()

    def __call__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, recompute_cache: RecomputeCache | None = None
    ) -> Tensor:
        if recompute_cache is None or not recompute_cache.is_recomputing:
            return super().__call__(x, topk_ids, topk_weights, recompute_cache)
        # Their backward comes next. FSDP2's hooks would let go of the weights after this run and gather them once more, and
        # take the run for one more whose backward is to be prefetched (torch < 2.13).
        assert isinstance(self, FSDPModule)
        self.unshard()
        return self.forward(x, topk_ids, topk_weights, recompute_cache)

    def forward(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, recompute_cache: RecomputeCache | None = None
    ) -> Tensor:
        """x [T, H], topk_ids [T, K] of all experts -> [T, H]"""
        gate_up_proj, down_proj = (
            cast(DTensor, w).to_local() for w in (self.gate_up_proj, self.down_proj)
        )  # [E/ep, …]
        return self.kernel(x, topk_ids, topk_weights, gate_up_proj, down_proj, self.group, recompute_cache)


def local_experts(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """[E, …] that every rank has -> the same, split over the mesh; no communication."""
    mine = weight.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    split = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
    return nn.Parameter(split, requires_grad=weight.requires_grad)


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> list[ParallelExperts]:
    """Swap the experts of every layer, multi-token prediction's included; in the order of the layers."""
    swapped = []
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        assert isinstance(layer.experts, Experts)
        swapped.append(ParallelExperts(layer.experts, mesh))
        layer.experts = swapped[-1]
    return swapped
