"""FSDP2: sharded fp32 master weights, computation in bf16, gradients summed in fp32.

Parameters that must not be rounded (A_log, dt_bias, the delta net's norm, the router) are
replicated in fp32; their gradients are reduced in one flat all-reduce per step. What is frozen
beside adapters is not trained at all, and is held in the dtype of the computation.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from kernels.features import FSDP_TAKES_FROZEN_DTYPES, fsdp_has_sums
from qwen35.model import Qwen35
from qwen35.model.lora import is_adapter
from qwen35.parallel.expert_parallel import ParallelExperts, apply_expert_parallel
from qwen35.parallel.mesh import Meshes

REPLICATED = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight", "mlp.gate.weight")


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that stay out of FSDP."""
    return [p for name, p in model.named_parameters() if name.endswith(REPLICATED)]


def frozen_base(model: nn.Module) -> list[nn.Parameter]:
    """What adapters are trained beside, without replicated parameters; empty without adapters."""
    named = dict(model.named_parameters())
    if not any(map(is_adapter, named)):
        return []
    return [p for name, p in named.items() if not is_adapter(name) and not name.endswith(REPLICATED)]


def shard(model: Qwen35, meshes: Meshes, dtype: torch.dtype, is_balanced: bool = False) -> None:
    """Shard a plain model (on the meta device or not) in place; `dtype` is that of the computation.

    FSDP units: each decoder layer and vision block, the rest of the vision tower, multi-token
    prediction if it is trained, and the embedding, final norm and head; with expert parallelism
    also each layer's experts. Gradients are summed over the ranks, not averaged: the loss is
    already normalised over all of them. Where no other rank shares a frozen base, FSDP leaves it
    alone, since it would copy what is there. is_balanced: experts may move between ranks.
    """
    for parameter in frozen_base(model):
        parameter.data = parameter.data.to(dtype)
    replicas = meshes.weights["replicate"]
    is_hybrid = replicas.size() > 1 and fsdp_has_sums()
    unit = partial(
        fully_shard,
        mesh=meshes.weights if is_hybrid else meshes.weights["shard"],
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
    )

    def ignored(shards: DeviceMesh) -> set[nn.Parameter]:
        return {*replicated(model), *(frozen_base(model) if shards.size() == 1 else [])}

    if meshes.experts["ep"].size() > 1:
        # shard the second axis: a rank may own fewer experts than FSDP has ranks to shard them over
        mesh = meshes.experts["replicate", "fsdp"] if is_hybrid else meshes.experts["fsdp"]
        layers = apply_expert_parallel(model, meshes.experts["ep"], is_balanced)
        alone = ignored(meshes.experts["fsdp"])
        # an adapter's A has few rows, so its columns are sharded
        columns = {p for layer in layers for n, p in layer.named_parameters() if n.endswith("lora_A")}
        placed = partial(unit, mesh=mesh, shard_placement_fn=lambda p: Shard(2 if p in columns else 1))
        for experts in layers:
            placed(experts, ignored_params=alone)
    unit = partial(unit, ignored_params=ignored(meshes.weights["shard"]))
    if model.model.visual is not None:
        for block in model.model.visual.blocks:
            unit(block)
        unit(model.model.visual)
    for layer in model.model.language_model.layers:
        unit(layer)
    if hasattr(model, "mtp"):
        unit(model.mtp)
    unit(model)
    _prefetch(model)
    for method in ("loss", "log_probs"):
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module, replicas)
            if not FSDP_TAKES_FROZEN_DTYPES and dtype != torch.float32:
                _take_frozen_dtypes(module)


def _prefetch(model: Qwen35) -> None:
    """In forward, start to unshard the next unit before a unit computes, so that they overlap.

    A host sync in the unit would otherwise delay this. One more unit is unsharded meanwhile. In
    backward, at the memory peak, FSDP2's own prefetch of one unit is enough.
    """
    tower = model.model.visual
    order = [] if tower is None else [tower, *tower.blocks]
    order += [*model.model.language_model.layers, *([model.mtp] if hasattr(model, "mtp") else [])]
    for unit, following in pairwise(order):
        unit.set_modules_to_forward_prefetch([m for m in following.modules() if isinstance(m, FSDPModule)])


def _sum_gradients(module: FSDPModule, replicas: DeviceMesh) -> None:
    """Use plain sums, which every backend has: HCCL lacks scaled sums, and gloo lacks averages."""
    if fsdp_has_sums():
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        return
    # torch 2.7's setter allows only scaled sums, and FSDP2 always averages over replicas: set the
    # field directly, and sum over replicas in a hook after the reduce-scatter
    group = module._get_fsdp_state()._fsdp_param_group
    if group is not None:
        group.reduce_scatter_reduce_op = dist.ReduceOp.SUM  # type: ignore[attr-defined]  # 2.7 has it
    if replicas.size() > 1:
        module.set_all_reduce_hook(partial(dist.all_reduce, group=replicas.get_group()))


def _take_frozen_dtypes(module: FSDPModule) -> None:
    """torch 2.7 asserts one dtype of all parameters of a unit, where later ones ask the trained.

    It does nothing else there but to set these fields, of which trained parameters are fp32.
    """
    group = module._get_fsdp_state()._fsdp_param_group
    if group is None or {p.sharded_param.dtype for p in group.fsdp_params} == {torch.float32}:
        return

    def init() -> None:
        for parameter in group.fsdp_params:
            parameter.init_dtype_attrs(group.mp_policy)
        group._orig_dtype, group._reduce_dtype = torch.float32, group.mp_policy.reduce_dtype

    group._init_mp_dtypes = init  # type: ignore[method-assign]


def reshard(model: nn.Module) -> None:
    """Free the root's unsharded weights, which FSDP2 keeps after a forward without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gather_weights(model: nn.Module, plain: nn.Module) -> None:
    """Copy all weights into a plain model of the same shape on each rank. A collective."""
    experts = [module for module in model.modules() if isinstance(module, ParallelExperts)]
    slots = {p: module.slots for module in experts for p in module.parameters() if module.slots is not None}
    for (name, full), (sharded_name, sharded) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert name == sharded_name
        whole = sharded.full_tensor() if isinstance(sharded, DTensor) else sharded
        full.copy_(whole[slots[sharded]] if sharded in slots else whole)


def reduce_replicated(model: nn.Module) -> None:
    """Sum the gradients of the replicated parameters over all ranks in one all-reduce."""
    grads = [p.grad for p in replicated(model) if p.grad is not None]
    if not grads or dist.get_world_size() == 1:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))
