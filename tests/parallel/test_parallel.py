"""Real processes over gloo: several ranks compute what one process computes."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import spawn
from peer import config_dict, pack, sample
from ports import free_port
from small_steps import fill_from, full
from torch.testing._internal.distributed.fake_pg import FakeStore

from qwen35.config.load import load_settings
from qwen35.config.schema import ParallelSettings, TrainingSettings
from qwen35.device import HOST, init_process
from qwen35.heartbeat import Heartbeat
from qwen35.model import Qwen35, load_config
from qwen35.parallel.activation_offload import Offload
from qwen35.parallel.fsdp import reduce_replicated, shard
from qwen35.parallel.mesh import make_meshes
from qwen35.rank import leave
from qwen35.train import TIMEOUT_MARGIN, setup
from qwen35.training import parameter_groups
from qwen35.training.loss import token_weights
from qwen35.training.optimizer import GradientNorm, make_optimizer

STEPS = 2
# four micro-batches: images of several sizes, no images, no labels
BATCHES = [
    pack([sample([9, (4, 4), 6], seed=0), sample([5, (2, 6), 8], seed=1)]),
    pack([sample([20], seed=2), sample([31], seed=3)]),
    pack([sample([3, (8, 4), 4], seed=4)]),
    pack([sample([17], seed=5)]),
]
BATCHES[3].labels.fill_(-100)


def worker(rank: int, world: int, port: int, out: Path, cases: dict[str, dict]) -> None:
    """All cases, one after the other."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    device = init_process()
    found = {name: train(device, **case) for name, case in cases.items()}
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()
    leave(0)


def train(
    device: torch.device,
    config: dict | None = None,
    parallel: dict | None = None,
    freeze: Sequence[str] = (),
    recompute: bool | str = False,
    offload: bool = False,
    optimizer: str = "adamw",
) -> dict:
    """Some steps -> losses and norms of all, gradients of the first, weights after the last."""
    config = config_dict(**config or {})
    whole = Qwen35.from_config(config, seed=1)
    meshes = make_meshes(device.type, ParallelSettings(**parallel or {}))
    with torch.device("meta"):
        model = Qwen35(load_config(config))
    parameter_groups.freeze(model, freeze)
    shard(model, meshes, torch.float32)
    fill_from(model, whole)
    model.recompute(recompute)
    if offload:
        model.model.language_model.offload = Offload(device, 0).stash
    t = TrainingSettings(train_iters=STEPS, save="x", lr=1e-2, weight_decay=0.1, adam_eps=1e-4, optimizer=optimizer)
    adam = make_optimizer(model, t)
    norm = GradientNorm(model, meshes.weights["shard"].get_group())
    losses, gradients, norms = [], {}, []
    for step in range(STEPS):
        total = torch.zeros(())
        for batch in BATCHES[dist.get_rank() :: dist.get_world_size()]:
            loss, aux, _ = model.loss(batch, token_weights(batch, "default") / len(BATCHES))
            both = loss + 0.1 * aux / len(BATCHES)
            both.backward()
            total += both.detach()
        dist.all_reduce(total)
        losses.append(float(total))
        reduce_replicated(model)
        squares = norm.squares()
        norms.append(float(squares.sum().sqrt()))
        norm.clip(squares.sum().sqrt(), 0.05)
        if step == 0:
            gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        adam.step()
        adam.zero_grad()
    weights = {n: full(p) for n, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def run(folder: Path, world: int, cases: dict[str, dict]) -> dict[str, dict]:
    out = folder / f"{world}.pt"
    spawn(worker, world, free_port(), out, cases, ranks=world)
    return torch.load(out)


# one process, and two beside it
PLAIN = {
    "as it is": {},
    "frozen tower": {"freeze": ["model.visual", "model.language_model.layers.{*}.mlp.gate"]},
    "dense, tied": {"config": {"moe": False, "tied": True}},
}
CASES = {
    "sharded": {},
    "replicated": {"parallel": {"fully_shard_parallel_size": 1}},
    "recompute": {"recompute": True},
    "selective, on the host": {"recompute": "selective", "offload": True, "optimizer": "adamw_swap"},
    "frozen tower": PLAIN["frozen tower"],
    "dense, tied": PLAIN["dense, tied"],
}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("one"), 1, PLAIN)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("two"), 2, CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(one, two, name):
    check(CASES[name], one[name if name in PLAIN else "as it is"], two[name])


def test_two_replicas_of_two_shards_equal_one(one, tmp_path):
    four = run(tmp_path, 4, {"2 x 2": {"parallel": {"fully_shard_parallel_size": 2}}})
    check({}, one["as it is"], four["2 x 2"])


def test_process_groups_have_the_timeout_of_the_settings(workplace, monkeypatch):
    """Longer than the launcher's watchdog, which reports more."""
    asked = []

    def ask(*args):
        asked.append(args)
        raise RuntimeError("that is all")

    monkeypatch.setattr("qwen35.train.make_meshes", ask)
    settings = load_settings(workplace / "recipe.yaml", ["training.timeout=5000", f"training.save={workplace / 'no'}"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="that is all"):
            setup(settings, HOST, Heartbeat())
    finally:
        dist.destroy_process_group()
    assert asked == [("cpu", settings.parallel, 5000 + TIMEOUT_MARGIN)]


def check(case: dict, one: dict, two: dict) -> None:
    for kind in ("losses", "norms"):
        assert two[kind] == pytest.approx(one[kind], rel=1e-5), kind
    assert one["losses"][0] > one["losses"][-1]
    for kind in ("gradients", "weights"):
        assert one[kind].keys() == two[kind].keys()
        for name, value in one[kind].items():
            difference = (two[kind][name] - value).norm()
            assert difference <= 1e-5 * value.norm() + 1e-9, f"{kind} of {name}: {difference / value.norm():.1e}"
    assert set(one["gradients"]) == {n for n in one["weights"] if not is_frozen(n, case)}


def is_frozen(name: str, case: dict) -> bool:
    return bool(case.get("freeze")) and ("visual" in name or name.endswith("mlp.gate.weight"))
