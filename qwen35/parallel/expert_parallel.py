"""Expert parallelism: each rank of a group owns and computes some of the experts."""

from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from kernels.recompute_cache import RecomputeCache
from qwen35.model.moe import Experts, MoE


class ParallelExperts(nn.Module):
    """Replaces `Experts`: the same parameter names, with the local experts only."""

    def __init__(self, experts: Experts, mesh: DeviceMesh):
        """mesh: [ep], whose size divides the number of experts. Weights may be on "meta"."""
        super().__init__()
        self.gate_up_proj = local_experts(experts.gate_up_proj, mesh)
        self.down_proj = local_experts(experts.down_proj, mesh)
        self.kernel, self.group = experts.parallel_kernel, mesh.get_group()

    def __call__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, recompute_cache: RecomputeCache | None = None
    ) -> Tensor:
        if recompute_cache is None or not recompute_cache.is_recomputing:
            return super().__call__(x, topk_ids, topk_weights, recompute_cache)
        # Backward follows this recomputation at once. FSDP2's hooks would reshard the weights in
        # between and gather them again, and record one more forward to prefetch for (torch < 2.13).
        assert isinstance(self, FSDPModule)
        self.unshard()
        return self.forward(x, topk_ids, topk_weights, recompute_cache)

    def forward(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, recompute_cache: RecomputeCache | None = None
    ) -> Tensor:
        """x [T, H], topk_ids [T, K] below E, topk_weights [T, K] -> [T, H]"""
        # [E/ep, …] each
        gate_up_proj, down_proj = (cast(DTensor, w).to_local() for w in (self.gate_up_proj, self.down_proj))
        return self.kernel(x, topk_ids, topk_weights, gate_up_proj, down_proj, self.group, recompute_cache)


def local_experts(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """weight [E, …], present on every rank -> sharded over the mesh, without communication."""
    local = weight.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    return nn.Parameter(sharded, requires_grad=weight.requires_grad)


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> list[ParallelExperts]:
    """Replace the experts of all layers, multi-token prediction's included; returns them."""
    replaced = []
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        assert isinstance(layer.experts, Experts)
        replaced.append(ParallelExperts(layer.experts, mesh))
        layer.experts = replaced[-1]
    return replaced
