"""The rehearsal itself: the run's own meshes, model, sharding, optimizer and step, as rank 0 of a virtual cluster."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import kernels
from kernels.moe_parallel import balanced
from qwen35.batch import PackedBatch
from qwen35.config.layout import check_layout
from qwen35.config.schema import Settings
from qwen35.errors import SettingError
from qwen35.model import ModelConfig, Qwen35
from qwen35.parallel.mesh import make_meshes
from qwen35.train import Run, distribute, train_step
from qwen35.training.flops import Flops
from qwen35.training.optimizer import GradientNorm
from qwen35.training.parameter_groups import freeze
from rehearse.cluster import Machine, Observer, ranks
from rehearse.communication import Wire
from rehearse.lower_bound import Bytes, least
from rehearse.memory import Ledger
from rehearse.operators import Operators, refused
from rehearse.representatives import TEXT, VISION, Cut, CutModel, Moment, UnevenError


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
    """An Observer that knows the moment, for the others: autograd knows whether it runs backward, layers tell of themselves."""

    def __init__(self, others: list[Ledger | Operators | Wire], micro_batches: int) -> None:
        self.others, self.micro_batches = others, micro_batches
        self.enter(Moment("forward"))

    def enter(self, moment: Moment) -> None:
        self.moment = moment
        for other in self.others:
            other.moment = moment

    def at(self, kind: str = "", part: int = 0) -> None:
        self.enter(self.moment._replace(kind=kind, part=part))

    def saw(self, func: object, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        phase, batch, *_ = self.moment
        if is_backward() and phase == "forward":
            self.enter(Moment("backward", batch))
        elif not is_backward() and phase == "backward":
            self.enter(Moment("optimizer", batch) if batch + 1 == self.micro_batches else Moment("forward", batch + 1))

    def follow(self, kind: str, layers: nn.ModuleList, size: int) -> None:
        """Be told when `size` layers together begin, forward and backward; a layer that is run again is a part of backward."""

        def begins(part: int, layer: nn.Module, args: tuple) -> None:
            if not is_backward():
                self.at(kind, part)
                if part == 0:
                    self._at_gradient(args[0])

        def ends(part: int, is_last: bool, layer: nn.Module, args: tuple, out: Any) -> None:
            if not is_backward():
                self._at_gradient(out[0] if isinstance(out, tuple) else out, kind, part)
                if is_last:
                    self.at()

        for part, start in enumerate(range(0, len(layers), size)):
            # before FSDP's own, which gather this part's weights and ask for the next one's
            layers[start].register_forward_pre_hook(partial(begins, part), prepend=True)
            is_last = start + size == len(layers)
            layers[start + size - 1].register_forward_hook(partial(ends, part, is_last), prepend=True)

    def _at_gradient(self, x: Tensor, kind: str = "", part: int = 0) -> None:
        if x.requires_grad:
            x.register_hook(lambda _: self.at(kind, part))


def is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def local(tensors: Iterable[object]) -> list[Tensor]:
    """Of each tensor that is there, what this rank has of it; no operator."""
    return [x._local_tensor if isinstance(x, DTensor) else x for x in tensors if isinstance(x, Tensor)]


def rehearse(
    settings: Settings,
    config: ModelConfig,
    batches: list[PackedBatch],
    world: int,
    per_node: int,
    device: torch.device,
    imbalance: float = 1.0,
    is_whole: bool = False,
) -> Rehearsal:
    """One whole step over the micro-batches, which are on the host. `imbalance`: rows that come to this rank's experts, over
    what they were if every expert were chosen equally often. Of layers and micro-batches that are alike a few are run and
    counted for all, unless `is_whole`. Raises SettingError, RehearsalError.
    """
    check_layout(settings, world)
    if settings.model.kernels.get("moe_experts_parallel") == "alltoallv_gmm":
        raise SettingError(
            "model.kernels.moe_experts_parallel=alltoallv_gmm asks HCCL for its communicator, and there is none here: "
            "rehearse without it, which sends the same"
        )
    alike = len(batches) if all(batch is batches[0] for batch in batches) else 1
    try:
        with ranks(world):
            cut = Cut.of(config, alike, is_whole)
            return _rehearse(settings, config, batches, per_node, device, imbalance, cut)
    except UnevenError as why:
        print(f"all layers are rehearsed, for {why}", flush=True)
    with ranks(world):
        return _rehearse(settings, config, batches, per_node, device, imbalance, Cut.of(config, alike, is_whole=True))


def _rehearse(
    settings: Settings,
    config: ModelConfig,
    batches: list[PackedBatch],
    per_node: int,
    device: torch.device,
    imbalance: float,
    cut: Cut,
) -> Rehearsal:
    t, m = settings.training, settings.model
    meshes = make_meshes(device.type, settings.parallel)
    ledger, operators, wire = Ledger(device.type, cut), Operators(cut), Wire(meshes, per_node, cut)

    def sizes(counts: Tensor, tokens: int, top_k: int) -> list[list[list[int]]]:
        operators.seen[operators.moment].syncs += 1
        return balanced(counts, tokens, top_k, imbalance)

    chosen = kernels.select(device.type, m.kernels)
    chosen = replace(chosen, moe_experts_parallel=partial(chosen.moe_experts_parallel, sizes=sizes))
    with torch.device("meta"):
        whole = Qwen35(config, kernels=chosen, mtp=bool(m.mtp_num_layers))
        model = CutModel(cut.config, kernels=chosen, mtp=bool(m.mtp_num_layers))
    freeze(whole, m.freeze)
    freeze(model, m.freeze)
    of_device: list[Observer] = [operators] if device.type == "npu" else []
    observers: list[Observer] = [ledger, *of_device]
    # each its own, as in a run: what kernels keep with a batch is not found again for the next
    rehearsed = [deepcopy(batch) for batch in batches[: cut.kept("") if cut.is_cut("") else None]]
    with Machine(device, observers) as machine:
        ledger.doubles = machine.doubles
        optimizer = distribute(settings, model, meshes, device)
        _first_step(optimizer)
        assert isinstance(model, FSDPModule)
        model._get_fsdp_state()._lazy_init()  # once a run, and else in the first forward
        _stand_for(whole, model, optimizer, cut, observers)
        ledger.claim("parameters", local(model.parameters()))
        states = local(x for p in model.parameters() for x in optimizer.state.get(p, {}).values())
        ledger.claim("optimizer", states)
        operators.locked.claim("optimizer", states)
        gradients = GradientNorm(model, meshes.weights["shard"].get_group())
        optimizer.register_step_pre_hook(
            lambda *_: ledger.claim("gradients", local(p.grad for p in model.parameters()))
        )
        run = Run(settings, device, meshes, model, optimizer, gradients, iter(()), 0, {})
        run.flops = Flops(whole)
        clock = Clock([ledger, operators, operators.locked, wire], len(rehearsed))
        clock.follow(TEXT, model.model.language_model.layers, cut.period)
        clock.follow(VISION, model.model.visual.blocks, 1)
        observers[:] = [clock, ledger, wire, *of_device]
        try:
            record = train_step(run, rehearsed, t.lr, 0.0)
        except RuntimeError as error:
            if known := refused(error):
                raise known from None
            raise
    for seen in (operators, operators.locked, ledger, wire):
        seen.check()
    lowest = least(model, meshes, settings, len(batches[0].pixel_values))
    tokens = sum(len(b.input_ids) - (0 if b.is_pad is None else int(b.is_pad.sum())) for b in batches)
    return Rehearsal(
        meshes.weights.size(),
        meshes.data_size,
        sum(p.numel() for p in whole.parameters()),
        ledger,
        operators,
        wire,
        lowest,
        record.flops / len(rehearsed) * len(batches) / meshes.ulysses_size,
        tokens,
    )


def _stand_for(
    whole: Qwen35, model: CutModel, optimizer: torch.optim.Optimizer, cut: Cut, observers: list[Observer]
) -> None:
    """From now on what looks at all layers at once finds as many as the whole model has: the optimizer, the gradient norm, and
    the loss of the routers, for which their statistics are given as often as the layers that made them stand for others."""
    model.cut, model.names, model.config = cut, [name for name, _ in whole.named_parameters()], whole.config
    for group in optimizer.param_groups:
        here = {id(p) for p in group["params"]}
        group["params"] = [p for p in model.parameters() if id(p) in here]

    def stats(layer: nn.Module, args: tuple, out: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        hidden, made = out
        watching, observers[:], found, left = observers[:], [], [], set(range(len(made)))
        for index in range(len(whole.config.text.layer_types) if made else 0):
            of_layer = cut.layer(TEXT, index)
            found.append(made[of_layer] if of_layer in left else made[of_layer].detach())  # backward knows each once
            left.discard(of_layer)
        observers[:] = watching
        return hidden, found

    model.model.language_model.register_forward_hook(stats)


def _first_step(optimizer: torch.optim.Optimizer) -> None:
    """It makes the optimizer's state, which every later step finds."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
