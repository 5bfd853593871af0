"""What adapters of the routed experts cost on fake NPU tensors: operators, and bytes."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # torch 2.7 registers the collectives' shapes in it
from fused import fused
from live_bytes import LiveBytes
from steps import DEVICE, EXPERTS, SLICE
from table import publish
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from watch import SavedBytes, Watch

from kernels.moe_lora import ExpertAdapters
from rehearse.communication import balanced_counts

TOKENS, RANK = 2048, 16
HIDDEN, INNER, E, TOP_K = (
    SLICE["hidden_size"],
    *(EXPERTS[key] for key in ("moe_intermediate_size", "num_experts", "num_experts_per_tok")),
)
WAYS = {  # ranks, and what training the weights launches, forward and backward: as before there were adapters
    "one rank": (1, (9, 16)),
    "all-to-all, 16 ranks": (16, (39, 27)),
    "all-gather, 4 ranks": (4, (33, 28)),
}
TRAINED = {"weights": (True, False), "nothing": (False, False), "adapters": (False, True)}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Off: it would add an operator per new tensor."""


@dataclass
class Layer:
    dispatched: tuple[int, int]  # forward, backward
    launched: tuple[int, int]  # dispatched operators without views
    saved: int  # bytes for backward
    peak: tuple[int, int]  # bytes in forward and in backward, with the gradients
    wrong: list[str]


def experts(ranks: int, trained: bool, adapted: bool) -> Layer:
    local = E // ranks
    with FakeTensorMode(), torch.device(DEVICE):

        def made(*shape: int, trained: bool = True) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, requires_grad=trained)

        ids, x, weights = torch.zeros(TOKENS, TOP_K, dtype=torch.long), made(TOKENS, HIDDEN), made(TOKENS, TOP_K)
        stacks = [made(local, 2 * INNER, HIDDEN, trained=trained), made(local, HIDDEN, INNER, trained=trained)]
        gate_up = made(local, RANK, HIDDEN), made(local, 2 * INNER, RANK)
        down = made(local, RANK, INNER), made(local, HIDDEN, RANK)
        adapters = ExpertAdapters(2.0, gate_up, down) if adapted else None

        def run() -> torch.Tensor:
            if ranks == 1:
                return fused.moe_experts(x, ids, weights, *stacks, adapters=adapters)
            return fused.moe_experts_parallel(
                x, ids, weights, *stacks, dist.group.WORLD, count_reader=balanced_counts, adapters=adapters
            )

        kept = SavedBytes([x, *stacks, *gate_up, *down])
        with kept:
            run()
        with LiveBytes("npu") as live:
            y = run()
            in_forward, held = live.peak, live.now
        with LiveBytes("npu") as live:
            torch.autograd.grad(
                y, [t for t in (x, weights, *stacks, *gate_up, *down) if t.requires_grad], y, allow_unused=True
            )
        with Watch() as forward:
            y = run()
        with Watch() as backward:
            y.backward(y.detach())
    parts = forward.record, backward.record
    return Layer(
        tuple(part.ops.total() for part in parts),
        tuple(part.launched for part in parts),
        kept.total,
        (in_forward, held + live.peak),
        [*parts[0].wrong, *parts[1].wrong],
    )


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], Layer]:
    found = {}
    for way, (ranks, _) in WAYS.items():
        if ranks > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        for what, (trained, adapted) in TRAINED.items():
            found[way, what] = experts(ranks, trained, adapted)
        if ranks > 1:
            dist.destroy_process_group()
    return found


def test_operators(measured):
    """What an adapter adds is exact, and published; nothing of it runs without one."""
    for way, (_, plain) in WAYS.items():
        full, frozen, adapted = (measured[way, what] for what in TRAINED)
        assert not [*full.wrong, *frozen.wrong, *adapted.wrong]
        assert full.launched == plain, way
        # two matmuls and a sum for each projection
        assert adapted.launched[0] - plain[0] == 2 * 3, way
        # the same, A's product again, the gradients of A and B, and the scale of both low-rank
        # sides; without the weights' gradients
        assert adapted.launched[1] - plain[1] == 2 * (3 + 1 + 2 + 2) - 2, way
    publish("2-adapters.md", lines(measured))


def test_bytes(measured):
    """Kept for backward: what training the weights keeps. At the peak two low-rank sides more."""
    rows = 2 * TOKENS * TOP_K  # bytes of one column
    for way in WAYS:
        full, _, adapted = (measured[way, what] for what in TRAINED)
        assert adapted.saved == full.saved, way
        assert adapted.peak[1] <= full.peak[1] + 2 * RANK * rows, way
        # in forward down's product is there beside its sum
        assert adapted.peak[0] <= full.peak[0] + (HIDDEN + 2 * RANK) * rows < full.peak[1], way


def lines(measured: dict[tuple[str, str], Layer]) -> Iterable[str]:
    yield f"The routed experts of a layer, bf16, T={TOKENS}, top {TOP_K} of {E}; adapters of rank {RANK}, weights frozen"
    yield "| way | trained | operators, forward + backward | without views | bytes for backward, a token | at the peak |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (way, what), layer in measured.items():
        counts = " | ".join(" + ".join(map(str, n)) for n in (layer.dispatched, layer.launched))
        yield f"| {way} | {what} | {counts} | {layer.saved / TOKENS:,.0f} | {max(layer.peak) / TOKENS:,.0f} |"
