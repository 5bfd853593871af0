"""The rehearsal itself: the run's own meshes, model, sharding, optimizer and step, as rank 0 of a virtual cluster."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import kernels
from kernels.moe_parallel import balanced
from qwen35.batch import PackedBatch
from qwen35.errors import SettingError
from qwen35.layout import check_layout
from qwen35.model import ModelConfig, Qwen35
from qwen35.optim import GradientNorm
from qwen35.parallel import make_meshes
from qwen35.settings import Settings
from qwen35.train import Run, distribute, train_step
from qwen35.trainable import freeze
from rehearse.cluster import Machine, Observer, ranks
from rehearse.least import Bytes, least
from rehearse.memory import Ledger
from rehearse.operators import Operators, refused
from rehearse.wire import Wire


@dataclass
class Rehearsal:
    """What one step does on rank 0."""

    ranks: int
    data_ranks: int  # that have bins of their own
    parameters: int  # of the whole model
    ledger: Ledger
    operators: Operators
    wire: Wire
    least: Bytes  # to be sent by rank 0
    flops: float  # the model's, for this rank's share of its bins
    tokens: int  # of its bins, padding not counted


class Clock:
    """An Observer that tells the phases apart, for the others: autograd knows whether it runs backward."""

    def __init__(self, others: list[Ledger | Operators], micro_batches: int) -> None:
        self.others, self.left = others, micro_batches
        self.phase = ""
        self.enter("forward")

    def enter(self, phase: str) -> None:
        self.phase = phase
        for other in self.others:
            other.phase = phase

    def saw(self, func: object, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        is_backward = torch._C._current_graph_task_id() != -1
        if is_backward and self.phase == "forward":
            self.enter("backward")
        elif not is_backward and self.phase == "backward":
            self.left -= 1
            self.enter("forward" if self.left else "optimizer")


def local(tensors: Iterable[object]) -> list[Tensor]:
    """Of each tensor that is there, what this rank has of it."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors if isinstance(x, Tensor)]


def rehearse(
    settings: Settings,
    config: ModelConfig,
    batches: list[PackedBatch],
    world: int,
    per_node: int,
    device: torch.device,
    imbalance: float = 1.0,
) -> Rehearsal:
    """One whole step over the micro-batches, which are on the host. `imbalance`: rows that come to this rank's experts, over
    what they were if every expert were chosen equally often. Raises SettingError, RehearsalError.
    """
    check_layout(settings, world)
    if settings.model.kernels.get("moe_experts_parallel") == "alltoallv_gmm":
        raise SettingError(
            "model.kernels.moe_experts_parallel=alltoallv_gmm asks HCCL for its communicator, and there is none here: "
            "rehearse without it, which sends the same"
        )
    with ranks(world):
        return _rehearse(settings, config, batches, per_node, device, imbalance)


def _rehearse(
    settings: Settings,
    config: ModelConfig,
    batches: list[PackedBatch],
    per_node: int,
    device: torch.device,
    imbalance: float,
) -> Rehearsal:
    t, m = settings.training, settings.model
    meshes = make_meshes(device.type, settings.parallel)
    ledger, operators, wire = Ledger(device.type), Operators(), Wire(meshes, per_node)

    def sizes(counts: Tensor, tokens: int, top_k: int) -> list[list[list[int]]]:
        operators.syncs[operators.phase] += 1
        return balanced(counts, tokens, top_k, imbalance)

    chosen = kernels.select(device.type, m.kernels)
    chosen = replace(chosen, moe_experts_parallel=partial(chosen.moe_experts_parallel, sizes=sizes))
    with torch.device("meta"):
        model = Qwen35(config, kernels=chosen, mtp=bool(m.mtp_num_layers))
    freeze(model, m.freeze)
    parameters = sum(p.numel() for p in model.parameters())
    of_device: list[Observer] = [operators] if device.type == "npu" else []
    observers: list[Observer] = [ledger, *of_device]
    with Machine(device, observers) as machine:
        ledger.doubles = machine.doubles
        optimizer = distribute(settings, model, meshes, device)
        ledger.claim("parameters", local(model.parameters()))
        _first_step(optimizer)
        ledger.claim("optimizer", local(x for of_one in optimizer.state.values() for x in of_one.values()))
        gradients = GradientNorm(model, meshes.weights["shard"].get_group())
        optimizer.register_step_pre_hook(
            lambda *_: ledger.claim("gradients", local(p.grad for p in model.parameters()))
        )
        run = Run(settings, device, meshes, model, optimizer, gradients, iter(()), 0, {})
        observers[:] = [Clock([ledger, operators], len(batches)), ledger, wire, *of_device]
        try:
            record = train_step(run, batches, t.lr, 0.0)
        except RuntimeError as error:
            if known := refused(error):
                raise known from None
            raise
    lowest = least(model, meshes, settings, len(batches[0].pixel_values))
    tokens = sum(len(b.input_ids) - (0 if b.is_pad is None else int(b.is_pad.sum())) for b in batches)
    return Rehearsal(
        meshes.weights.size(),
        meshes.data_size,
        parameters,
        ledger,
        operators,
        wire,
        lowest,
        record.flops / meshes.ulysses_size,
        tokens,
    )


def _first_step(optimizer: torch.optim.Optimizer) -> None:
    """It makes the optimizer's state, which every later step finds."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
