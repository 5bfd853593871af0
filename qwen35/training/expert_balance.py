"""At save points experts move to other ranks, where a layer's busiest rank has too much to do.

Experts are in their own order while a checkpoint is written, so that it is one like any other; what
it says besides is where they were to go on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from qwen35.checkpoint.dcp import EXTRA, CheckpointInfo
from qwen35.checkpoint.dcp_folder import damaged
from qwen35.config.schema import TrainingSettings
from qwen35.device import synchronize
from qwen35.log import logger
from qwen35.parallel.expert_balance import busiest, most_sent, move_rows, rebalance
from qwen35.parallel.expert_parallel import ParallelExperts
from qwen35.training.adamw import local
from qwen35.training.metrics import Metrics

KEY = "expert_balance"  # in extra.json
TYPES = {"ranks": int, "slots": Tensor, "counts": Tensor}
LEAST_GAIN = 0.05  # of the busiest rank's load; for less a layer's experts do not move
AIM = 0.25  # how far above the mean a moved layer may stay, of what expert_balance allows


def kept(t: TrainingSettings, checkpoint: CheckpointInfo | None) -> dict[str, Any]:
    """What a run takes over from the extras of the checkpoint that it goes on from.

    Raises CheckpointError if that is damaged.
    """
    state: Any = checkpoint.extra.get(KEY) if checkpoint and t.expert_balance else None
    if checkpoint is None or state is None:
        return {}
    is_whole = isinstance(state, dict) and {name: type(value) for name, value in state.items()} == TYPES
    if is_whole:
        slots, counts = state["slots"], state["counts"]
        is_whole = slots.dim() == 2 and slots.shape == counts.shape and state["ranks"] > 0
        is_whole = is_whole and bool((slots.sort(-1)[0] == torch.arange(slots.shape[-1])).all())
    if not is_whole:
        raise damaged(checkpoint.path, EXTRA, f"does not hold {KEY} as a run writes it")
    return {KEY: state}


class ExpertBalance:
    """Where each layer's experts are, and how many tokens they had since that was last decided."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, factor: float | None, extra: dict[str, Any]):
        """extra: with what `kept` found. A collective if experts are to move."""
        self.layers = [layer for layer in model.modules() if isinstance(layer, ParallelExperts)] if factor else []
        self.optimizer, self.factor, self.counts = optimizer, factor or 0.0, torch.zeros(0)
        if not self.layers:
            return
        self.ranks, experts = dist.get_world_size(self.layers[0].group), len(self.layers[0].gate_up_proj)
        self.own_order = [list(range(experts)) for _ in self.layers]
        self.slots, self.counts = self.own_order, torch.zeros(len(self.layers), experts)
        state = extra.get(KEY)
        if state and state["counts"].shape == self.counts.shape:
            self.counts = state["counts"]
            if state["ranks"] == self.ranks:  # else the next save decides anew
                self._move(state["slots"].tolist())

    @contextmanager
    def saving(self, metrics: Metrics, extra: dict[str, Any], is_due: bool, is_last: bool) -> Iterator[dict[str, Any]]:
        """Around a save: the experts are in their own order. Gives the extras of the checkpoint.

        is_due: decide anew where they are afterwards. A run that is stopped does not: resumed, it
        goes on as if it had not been. is_last: leave them, since no step follows.
        """
        if not self.layers:
            yield extra
            return
        self.counts = self.counts + metrics.take_expert_counts().cpu()
        wanted = self._decide(metrics.last["step"]) if is_due else self.slots
        state = {"ranks": self.ranks, "slots": torch.tensor(wanted, dtype=torch.int32), "counts": self.counts}
        self._move(self.own_order)
        yield extra | {KEY: state}
        if not is_last:
            self._move(wanted)

    def _decide(self, step: int) -> list[list[int]]:
        """The slots of all layers by the counts, which begin anew; logs what that changes."""
        counts, self.counts = self.counts.double().numpy(), torch.zeros_like(self.counts)
        wanted = []
        for load, slots in zip(counts, self.slots, strict=True):
            found = rebalance(load, slots, self.ranks, 1 + AIM * (self.factor - 1))
            before, after = (busiest(load, places, self.ranks) for places in (slots, found))
            wanted.append(found if before > self.factor and after <= before * (1 - LEAST_GAIN) else slots)
        worst = [
            max(busiest(load, places, self.ranks) for load, places in zip(counts, layers, strict=True))
            for layers in (self.slots, wanted)
        ]
        changed = sum(a != b for a, b in zip(self.slots, wanted, strict=True))
        text = f"step {step}: the busiest rank of a layer has computed {worst[0]:.2f} times the mean"
        if changed:
            text += f"; experts of {changed} of {len(wanted)} layers change their ranks, which makes it {worst[1]:.2f}"
        sent = self._bytes(self.slots, self.own_order), self._bytes(self.own_order, wanted)
        logger.info(f"{text}; a rank sends up to {sent[0]:,} bytes before the save, {sent[1]:,} after it")
        return wanted

    def _tensors(self, layer: ParallelExperts) -> list[Tensor]:
        """This rank's part of all that experts have: weights, adapters, the optimizer's moments."""
        moments = [x for p in layer.parameters() for x in self.optimizer.state.get(p, {}).values() if x.dim()]
        return [local(x.detach()) for x in (*layer.parameters(), *moments)]

    def _bytes(self, old: list[list[int]], new: list[list[int]]) -> int:
        """Bytes that the rank sends that sends most in a layer, over all layers."""
        return sum(
            most_sent(a, b, self.ranks) * sum(x.nbytes for x in self._tensors(layer)) // (len(a) // self.ranks)
            for layer, a, b in zip(self.layers, old, new, strict=True)
        )

    def _move(self, wanted: list[list[int]]) -> None:
        # the last step may still be copying moments to the host
        synchronize({layer.slots.device for layer in self.layers if layer.slots is not None})
        for layer, old, new in zip(self.layers, self.slots, wanted, strict=True):
            if old == new:
                continue
            assert layer.slots is not None
            for tensor in self._tensors(layer):
                move_rows(tensor, old, new, layer.group, layer.slots.device)
            layer.slots.copy_(torch.tensor(new))
        self.slots = wanted
