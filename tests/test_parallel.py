"""Real processes over gloo: what several ranks compute together is what one computes alone."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peer import config_dict, pack, sample
from torch.distributed.tensor import distribute_tensor

from qwen35.device import init_process
from qwen35.launch import leave
from qwen35.loss import token_weights
from qwen35.model import Qwen35, load_config
from qwen35.optim import GradientNorm, make_optimizer
from qwen35.parallel import make_meshes, reduce_held_out, shard
from qwen35.parallel.offload import Offload
from qwen35.settings import ParallelSettings, TrainingSettings
from qwen35.trainable import freeze

STEPS = 3
# four micro-batches: with images of several sizes, without any, and one with nothing to train
BATCHES = [
    pack([sample([9, (4, 4), 6], seed=0), sample([5, (2, 6), 8], seed=1)]),
    pack([sample([20], seed=2), sample([31], seed=3)]),
    pack([sample([3, (8, 4), 4], seed=4)]),
    pack([sample([17], seed=5)]),
]
BATCHES[3].labels.fill_(-100)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def worker(rank: int, world: int, port: int, out: Path, case: dict) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    device = init_process()
    config = config_dict(**case.get("config", {}))
    whole = Qwen35.from_config(config, seed=1)
    meshes = make_meshes(device.type, ParallelSettings(**case.get("parallel", {})))
    with torch.device("meta"):
        model = Qwen35(load_config(config))
    freeze(model, case.get("freeze", []))
    shard(model, meshes, torch.float32)
    model.to_empty(device=device)
    with torch.no_grad():
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            if hasattr(p, "placements"):
                p.copy_(distribute_tensor(q.detach(), p.device_mesh, p.placements))
            else:
                p.copy_(q)
    model.recompute(case.get("recompute", False))
    if case.get("offload"):
        model.model.language_model.offload = Offload(device, 0).stash
    t = TrainingSettings(
        train_iters=STEPS, save="x", lr=1e-2, weight_decay=0.1, adam_eps=1e-4, **case.get("training", {})
    )
    optimizer = make_optimizer(model, t)
    norm = GradientNorm(model, meshes.weights["shard"].get_group())
    mine = BATCHES[rank::world]
    losses, gradients, norms = [], {}, []
    for step in range(STEPS):
        total = torch.zeros(())
        for batch in mine:
            loss, aux, _ = model.loss(batch, token_weights(batch, "default") / len(BATCHES))
            both = loss + 0.1 * aux / len(BATCHES)
            both.backward()
            total += both.detach()
        dist.all_reduce(total)
        losses.append(float(total))
        reduce_held_out(model)
        squares = norm.squares()
        norms.append(float(squares.sum().sqrt()))
        norm.clip(squares.sum().sqrt(), 0.05)
        if step == 0:
            gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: full(p.detach()) for n, p in model.named_parameters()}
    if rank == 0:
        torch.save({"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}, out)
    dist.destroy_process_group()
    leave(0)


def run(tmp_path: Path, world: int, **case) -> dict:
    out = tmp_path / f"{world}-{len(list(tmp_path.iterdir()))}.pt"
    mp.spawn(worker, args=(world, free_port(), out, case), nprocs=world)
    return torch.load(out)


CASES = {
    "sharded": {},
    "replicated": {"parallel": {"fully_shard_parallel_size": 1}},
    "recompute": {"recompute": True},
    "selective, on the host": {"recompute": "selective", "offload": True, "training": {"optimizer": "adamw_swap"}},
    "frozen tower": {"freeze": ["model.visual", "model.language_model.layers.{*}.mlp.gate"]},
    "dense, tied": {"config": {"moe": False, "tied": True}},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_processes_equal_one(tmp_path, case):
    check(case, run(tmp_path, 1, **case), run(tmp_path, 2, **case))


def test_two_replicas_of_two_shards_equal_one(tmp_path):
    check({}, run(tmp_path, 1), run(tmp_path, 4, parallel={"fully_shard_parallel_size": 2}))


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
