"""FSDP2: master weights fp32 and sharded, computed in bf16, gradients summed in fp32.

What must not be rounded (A_log, dt_bias, the delta net's norm, the router) is held out: replicated, always fp32, and its
gradients are reduced in one flat all-reduce a step.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from kernels.features import fsdp_has_sums
from qwen35.model import Qwen35
from qwen35.parallel.expert_parallel import apply_expert_parallel
from qwen35.parallel.mesh import Meshes

REPLICATED = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight", "mlp.gate.weight")


def replicated(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(REPLICATED)]


def shard(model: Qwen35, meshes: Meshes, dtype: torch.dtype) -> None:
    """Shard a plain model (on the meta device or not) in place; `dtype` is that of the arithmetic.

    One unit a decoder layer and vision block, one for the rest of the vision tower, one for multi-token prediction where that
    is trained, one for the embedding, the final norm and the head; and one inside of each layer for its experts, where these
    are split over ranks. Gradients are summed over the ranks, not averaged: the loss carries the division.
    """
    replicas = meshes.weights["replicate"]
    with_replicas = replicas.size() > 1 and fsdp_has_sums()
    unit = partial(
        fully_shard,
        mesh=meshes.weights if with_replicas else meshes.weights["shard"],
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        ignored_params=set(replicated(model)),
    )
    if meshes.experts["ep"].size() > 1:
        # cut along the second axis: a rank may have fewer experts than there are ranks to share them
        mesh = meshes.experts["replicate", "fsdp"] if with_replicas else meshes.experts["fsdp"]
        for experts in apply_expert_parallel(model, meshes.experts["ep"]):
            unit(experts, mesh=mesh, shard_placement_fn=lambda _: Shard(1))
    for block in model.model.visual.blocks:
        unit(block)
    unit(model.model.visual)
    for layer in model.model.language_model.layers:
        unit(layer)
    if hasattr(model, "mtp"):
        unit(model.mtp)
    unit(model)
    _prefetch(model)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module, replicas)


def _prefetch(model: Qwen35) -> None:
    """In forward, ask for the next unit's weights before a unit computes: one more is whole meanwhile, and the two overlap even
    where the host has to wait inside a layer. In backward, where the peak is, FSDP2 by itself is one unit ahead."""
    tower = model.model.visual
    order = [tower, *tower.blocks, *model.model.language_model.layers, *([model.mtp] if hasattr(model, "mtp") else [])]
    for one, following in pairwise(order):
        one.set_modules_to_forward_prefetch([m for m in following.modules() if isinstance(m, FSDPModule)])


def _sum_gradients(module: FSDPModule, replicas: DeviceMesh) -> None:
    """Plain sums, which every backend has: HCCL lacks the scaled one, gloo the average (that of torch 2.7 sums instead)."""
    if fsdp_has_sums():
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        return
    # torch 2.7's own setter allows the scaled sum alone, and its sum over replicas is always an average: here the field
    # that the setter sets, and a hook after the sum over the shards
    group = module._get_fsdp_state()._fsdp_param_group
    if group is not None:
        group.reduce_scatter_reduce_op = dist.ReduceOp.SUM  # type: ignore[attr-defined]  # 2.7 has it
    if replicas.size() > 1:
        module.set_all_reduce_hook(partial(dist.all_reduce, group=replicas.get_group()))


def reshard(model: nn.Module) -> None:
    """Of weights that a forward without a backward has left whole: the root's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gather_weights(model: nn.Module, plain: nn.Module) -> None:
    """Fill a plain model of the same shape on each rank, in its own dtypes; all ranks call it."""
    for (name, whole), (other, own) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        whole.copy_(own.full_tensor() if isinstance(own, DTensor) else own)


def reduce_replicated(model: nn.Module) -> None:
    """Sum the gradients of the replicated parameters over all ranks, in one call."""
    grads = [p.grad for p in replicated(model) if p.grad is not None]
    if not grads or dist.get_world_size() == 1:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))
