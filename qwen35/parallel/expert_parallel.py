"""Expert parallelism: each rank of a group owns and computes some of the experts."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from kernels.recompute_cache import RecomputeCache
from qwen35.model.moe import Experts, MoE


class ParallelExperts(Experts):
    """Replaces `Experts`: the same parameter names, with the local experts only."""

    def __init__(self, experts: Experts, mesh: DeviceMesh, is_balanced: bool = False):
        """mesh: [ep], whose size divides the number of experts. Weights may be on "meta".

        is_balanced: experts may move to other ranks; then `slots` says where each is.
        """
        nn.Module.__init__(self)  # the parameters are made below
        for name, parameter in experts.named_parameters():  # the projections and their adapters, whole on every rank
            local = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
            setattr(self, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        self.kernel, self.group, self.scale = experts.parallel_kernel, mesh.get_group(), experts.scale
        count = len(experts.gate_up_proj)
        self.slots = torch.arange(count, device=mesh.device_type) if is_balanced else None

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, cache: RecomputeCache | None = None) -> Tensor:
        if cache is None or not cache.is_recomputing:
            return super().__call__(x, ids, weights, cache)
        # Backward follows this recomputation at once. FSDP2's hooks would reshard the weights in
        # between and gather them again, and record one more forward to prefetch for (torch < 2.13).
        assert isinstance(self, FSDPModule)
        self.unshard()
        return self.forward(x, ids, weights, cache)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, cache: RecomputeCache | None = None) -> Tensor:
        """x [T, H]; ids [T, K] of experts, weights [T, K] of theirs -> [T, H]"""
        if self.slots is not None:
            ids = self.slots.index_select(0, ids.flatten()).view_as(ids)
        gate_up_proj, down_proj = _local(self.gate_up_proj), _local(self.down_proj)  # [E/ep, …] each
        adapters = self.adapters(_local)
        return self.kernel(x, ids, weights, gate_up_proj, down_proj, self.group, cache, adapters=adapters)


def _local(weight: Tensor) -> Tensor:
    return cast(DTensor, weight).to_local()


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh, is_balanced: bool) -> list[ParallelExperts]:
    """Replace the experts of all layers, multi-token prediction's included; returns them."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        layer.experts = ParallelExperts(cast(Experts, layer.experts), mesh, is_balanced)
    return [cast(ParallelExperts, layer.experts) for layer in layers]
