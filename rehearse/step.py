"""The rehearsal: the run's own meshes, model, sharding, optimizer and step, as rank 0."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import kernels
from qwen35.batch import PackedBatch
from qwen35.config.layout import check_layout
from qwen35.config.schema import Settings
from qwen35.errors import SettingError
from qwen35.model import ModelConfig, Qwen35
from qwen35.parallel.mesh import make_meshes
from qwen35.train import Run, distribute, train_step
from qwen35.training.adapters import build_model, choose_trained
from qwen35.training.flops import Flops
from qwen35.training.optimizer import GradientNorm
from rehearse.cluster import FakeDevice, Observer, fake_process_group
from rehearse.communication import Communication, balanced_counts
from rehearse.lower_bound import Bytes, lower_bound
from rehearse.memory import Ledger, Peak
from rehearse.operators import Operators, as_rehearsal_error
from rehearse.representatives import (
    MICRO_BATCH,
    TEXT,
    VISION,
    Moment,
    NotAlikeError,
    RepresentativeModel,
    Representatives,
)


@dataclass
class Rehearsal:
    """What one step does on rank 0."""

    ranks: int
    data_ranks: int  # that have packed sequences of their own
    parameters: int  # of the whole model
    ledger: Ledger
    operators: Operators
    communication: Communication
    lower_bound: Bytes  # that rank 0 has to send
    flops: float  # the model's, for this rank's part of its packed sequences
    recomputed: float  # FLOPs that recomputation adds to these
    flops_unpacked: float  # what `flops` would be if each packed sequence were one text
    tokens: int  # of its packed sequences, without padding

    @cached_property
    def peaks(self) -> dict[str, Peak]:
        """Of each phase: the report asks for them again and again."""
        return self.ledger.peaks()


class PhaseTracker:
    """An Observer that sets the others' `moment`, from autograd's state and hooks on the layers."""

    def __init__(self, others: list[Ledger | Operators | Communication], micro_batches: int) -> None:
        self.others, self.micro_batches = others, micro_batches
        self.enter(Moment("forward"))

    def enter(self, moment: Moment) -> None:
        self.moment = moment
        for other in self.others:
            other.moment = moment

    def enter_block(self, kind: str = "", block: int = 0) -> None:
        self.enter(self.moment._replace(kind=kind, block=block))

    def observe(self, func: object, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        phase, batch, *_ = self.moment
        if is_backward() and phase == "forward":
            self.enter(Moment("backward", batch))
        elif not is_backward() and phase == "backward":
            self.enter(Moment("optimizer", batch) if batch + 1 == self.micro_batches else Moment("forward", batch + 1))

    def track(self, kind: str, layers: nn.ModuleList, size: int) -> None:
        """Follow blocks of `size` layers. A recomputed layer belongs to backward."""

        def begin(block: int, layer: nn.Module, args: tuple) -> None:
            if not is_backward():
                self.enter_block(kind, block)
                if block == 0:
                    self._enter_at_gradient(args[0])

        def end(block: int, is_last: bool, layer: nn.Module, args: tuple, out: Any) -> None:
            if not is_backward():
                self._enter_at_gradient(out[0] if isinstance(out, tuple) else out, kind, block)
                if is_last:
                    self.enter_block()

        for block, start in enumerate(range(0, len(layers), size)):
            # before FSDP's own hooks, which gather this block's weights and prefetch the next one's
            layers[start].register_forward_pre_hook(partial(begin, block), prepend=True)
            is_last = start + size == len(layers)
            layers[start + size - 1].register_forward_hook(partial(end, block, is_last), prepend=True)

    def _enter_at_gradient(self, x: Tensor, kind: str = "", block: int = 0) -> None:
        if x.requires_grad:
            x.register_hook(lambda _: self.enter_block(kind, block))


def is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def local(tensors: Iterable[object]) -> list[Tensor]:
    """This rank's part of each tensor, without running an operator."""
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
    """One step over the micro-batches, which are on the host. Raises SettingError, RehearsalError.

    imbalance: rows for this rank's experts, over their number if every expert were chosen equally
    often. Unless is_whole, a few of the layers and micro-batches that are alike stand for all.
    """
    check_layout(settings, world)
    if settings.model.kernels.get("moe_experts_parallel") == "alltoallv_gmm":
        raise SettingError(
            "model.kernels.moe_experts_parallel=alltoallv_gmm needs HCCL's communicator, which does not exist here: "
            "rehearse without it, which sends the same"
        )
    alike = len(batches) if all(batch is batches[0] for batch in batches) else 1

    def run(is_whole: bool) -> Rehearsal:
        representatives = Representatives.of(config, alike, is_whole)
        with fake_process_group(world):
            return _rehearse(settings, config, batches, per_node, device, imbalance, representatives)

    try:
        return run(is_whole)
    except NotAlikeError as error:
        print(f"rehearsing every layer and micro-batch: {error}", flush=True)
    return run(is_whole=True)


def _rehearse(
    settings: Settings,
    config: ModelConfig,
    batches: list[PackedBatch],
    per_node: int,
    device: torch.device,
    imbalance: float,
    representatives: Representatives,
) -> Rehearsal:
    t, m = settings.training, settings.model
    meshes = make_meshes(device.type, settings.parallel)
    ledger, operators = Ledger(device.type, representatives), Operators(representatives)
    communication = Communication(meshes, per_node, representatives)

    def count_reader(counts: Tensor, tokens: int, top_k: int) -> list[list[list[int]]]:
        operators.seen[operators.moment].syncs += 1
        return balanced_counts(counts, tokens, top_k, imbalance)

    chosen = kernels.select(device.type, m.kernels)
    chosen = replace(chosen, moe_experts_parallel=partial(chosen.moe_experts_parallel, count_reader=count_reader))
    with torch.device("meta"):
        model = RepresentativeModel(representatives.config, kernels=chosen, mtp=bool(m.mtp_num_layers))
    choose_trained(model, settings)
    whole = build_model(settings, config, chosen)
    of_device: list[Observer] = [operators] if device.type == "npu" else []
    observers: list[Observer] = [ledger, *of_device]
    # as in a run each is an object of its own: kernels cache what they derive from a batch with it
    few = representatives.count(MICRO_BATCH) if representatives.is_reduced(MICRO_BATCH) else None
    micro_batches = [deepcopy(batch) for batch in batches[:few]]
    flops = Flops(whole)
    with FakeDevice(device, observers) as fake_device:
        ledger.doubles = fake_device.doubles
        optimizer = distribute(settings, model, meshes, device)
        _make_optimizer_state(optimizer)
        assert isinstance(model, FSDPModule)
        model._get_fsdp_state()._lazy_init()  # once a run; otherwise the first forward would do it
        _represent(whole, model, optimizer, representatives, observers)
        ledger.claim("parameters", local(model.parameters()))
        states = local(x for p in model.parameters() for x in optimizer.state.get(p, {}).values())
        ledger.claim("optimizer", states)
        operators.pinned.claim("optimizer", states)
        gradients = GradientNorm(model, meshes.weights["shard"].get_group())
        optimizer.register_step_pre_hook(
            lambda *_: ledger.claim("gradients", local(p.grad for p in model.parameters()))
        )
        run = Run(settings, device, meshes, model, optimizer, gradients, iter(()), 0, {})
        run.flops = flops
        tracker = PhaseTracker([ledger, operators, operators.pinned, communication], len(micro_batches))
        tracker.track(TEXT, model.model.language_model.layers, representatives.period)
        if model.model.visual is not None:
            tracker.track(VISION, model.model.visual.blocks, 1)
        observers[:] = [tracker, ledger, communication, *of_device]
        try:
            record = train_step(run, micro_batches, t.lr, 0.0)
        except RuntimeError as error:
            if known := as_rehearsal_error(error):
                raise known from None
            raise
    for seen in (operators, operators.pinned, ledger, communication):
        seen.check()
    step_flops = record.flops / len(micro_batches) * len(batches) / meshes.ulysses_size
    cutoff_len = settings.data.dataset_param.basic_parameters.cutoff_len
    unpacked = torch.full((t.micro_batch_size,), cutoff_len)
    pairs = [flops.of(0, lengths, 0, batches[0].grid_thw[:0]) for lengths in (unpacked, batches[0].cu_seqlens.diff())]
    return Rehearsal(
        ranks=meshes.weights.size(),
        data_ranks=meshes.data_size,
        parameters=sum(p.numel() for p in whole.parameters()),
        ledger=ledger,
        operators=operators,
        communication=communication,
        lower_bound=lower_bound(model, meshes, settings, len(batches[0].pixel_values)),
        flops=step_flops,
        recomputed=_recomputed(whole, settings, batches) / meshes.ulysses_size,
        flops_unpacked=step_flops + (pairs[0] - pairs[1]) * len(batches) / meshes.ulysses_size,
        tokens=sum(len(b.input_ids) - (0 if b.is_pad is None else int(b.is_pad.sum())) for b in batches),
    )


def _recomputed(whole: Qwen35, settings: Settings, batches: list[PackedBatch]) -> float:
    """The layers' forward FLOPs once more, and the vision tower's if it is trained; freezes all.

    In fact less is repeated: not the experts' down projections, and by the selective kind neither
    the scores nor the delta rule. An adapter's B counts twice, which is a few thousandths.
    """
    if not settings.parallel.recompute:
        return 0.0
    tower = whole.model.visual
    is_tower_trained = tower is not None and any(p.requires_grad for p in tower.parameters())
    flops = Flops(whole.requires_grad_(False))
    grids = [batch.grid_thw if is_tower_trained else batch.grid_thw[:0] for batch in batches]
    lengths = [batch.cu_seqlens.diff() for batch in batches]
    return sum(flops.of(int(n.sum()), n, 0, grid) for n, grid in zip(lengths, grids, strict=True))


def _represent(
    whole: Qwen35,
    model: RepresentativeModel,
    optimizer: torch.optim.Optimizer,
    representatives: Representatives,
    observers: list[Observer],
) -> None:
    """Let what looks at all layers together see as many as the whole model has.

    These are the optimizer, the gradient norm, and the router's loss, which gets the statistics of
    each representative layer as often as it represents another.
    """
    model.representatives, model.config = representatives, whole.config
    model.names = [name for name, _ in whole.named_parameters()]
    for group in optimizer.param_groups:
        of_group = {id(p) for p in group["params"]}
        group["params"] = [p for p in model.parameters() if id(p) in of_group]

    def repeat_statistics(layer: nn.Module, args: tuple, out: tuple[Tensor, list[Tensor]]) -> tuple:
        hidden, statistics = out
        active, observers[:] = observers[:], []
        repeated, unused = [], set(range(len(statistics)))
        for index in range(len(whole.config.text.layer_types) if statistics else 0):
            own = representatives.layer(index)
            # only the first is part of the graph: backward runs through each layer once
            repeated.append(statistics[own] if own in unused else statistics[own].detach())
            unused.discard(own)
        observers[:] = active
        return hidden, repeated

    model.model.language_model.register_forward_hook(repeat_statistics)


def _make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """A first step makes the state that every later step finds."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
