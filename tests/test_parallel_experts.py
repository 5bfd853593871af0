"""Four real processes that split the experts in every way, against one plain model; nothing of FSDP in the reference."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peer import config_dict, pack, sample
from torch.distributed.tensor import DTensor

from qwen35.checkpoint import load_checkpoint, load_hf, save_checkpoint
from qwen35.checkpoint.hf import write_hf
from qwen35.checkpoint.load import fill
from qwen35.batch import PackedBatch
from qwen35.launch import leave
from qwen35.loss import look_ahead, token_weights
from qwen35.model import Qwen35, load_config
from qwen35.optim import GradientNorm, make_optimizer
from qwen35.parallel import make_meshes, reduce_held_out, shard
from qwen35.settings import ParallelSettings, TrainingSettings
from qwen35.trainable import freeze, table

RANKS, STEPS, AUX, LIMIT = 4, 3, 0.1, 0.05
CONFIG = config_dict(mtp_num_hidden_layers=1)
IDLE = (6, 7)  # experts that nobody chooses: of four ranks with two experts each, the last gets no token at all
ADAM = TrainingSettings(train_iters=STEPS, save="x", lr=1e-2, weight_decay=0.1, adam_eps=1e-4)
FROZEN = ["model.visual", "model.language_model.layers.{*}.mlp.gate", "model.language_model.layers.0.mlp.experts"]


def batches() -> list[PackedBatch]:
    """Eight micro-batches of 40 tokens: of images, of text, of both; ranks 1 and 3 see no image, rank 3 trains no token."""
    made = []
    for i in range(0, 8, 4):
        made += [
            pack([sample([9, (4, 4), 6], seed=i), sample([5, (2, 6), 9], seed=i + 1)]),
            pack([sample([20 + i], seed=i + 2), sample([20 - i], seed=i + 3)]),
            pack([sample([3, (8, 4), 4], seed=i + 4), sample([23], seed=i + 5)]),
            pack([sample([40], seed=i + 6)]),
        ]
        made[-1].labels.fill_(-100)
    assert {len(b.input_ids) for b in made} == {40}
    return made


BATCHES = batches()


def whole_model() -> Qwen35:
    """Random weights, but that the hidden states have one direction in common, which the idle experts' router avoids."""
    model = Qwen35.from_config(CONFIG, seed=1, mtp=True)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:, 0] = 0.1
        model.model.visual.merger.linear_fc2.bias[0] = 0.1
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight[list(IDLE)] = 0
                weight[list(IDLE), 0] = -0.5
    return model


def loss_of(model: Qwen35, batch: PackedBatch) -> torch.Tensor:
    """Its part of the mean over all micro-batches, with load balancing, backward done."""
    ahead = look_ahead(batch, "default") if hasattr(model, "mtp") else None
    loss, aux, _ = model.loss(batch, token_weights(batch, "default"), ahead, 0.3)
    both = (loss + AUX * aux) / len(BATCHES)
    both.backward()
    return both.detach()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients_of(model: Qwen35) -> dict[str, torch.Tensor]:
    return {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def reference(source: Path, mtp: bool, frozen: list[str]) -> dict:
    """One process, plain tensors, torch's own clipping."""
    model = Qwen35.from_pretrained(source, torch.float32, mtp=mtp)
    freeze(model, frozen)
    optimizer = make_optimizer(model, ADAM)
    losses, norms, gradients = [], [], []
    for _ in range(STEPS):
        losses.append(float(sum(loss_of(model, batch) for batch in BATCHES)))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)))
        gradients.append(gradients_of(model))
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights, "table": table(model)}


class Sharded:
    """A model on this rank, with what a step needs."""

    def __init__(self, source: Path, mtp: bool = False, frozen: list[str] = [], recompute=False, **parallel):
        meshes = make_meshes("cpu", ParallelSettings(**parallel))
        with torch.device("meta"):
            self.model = Qwen35(load_config(CONFIG), mtp=mtp)
        freeze(self.model, frozen)
        shard(self.model, meshes, torch.float32)
        self.model.to_empty(device="cpu")
        self.model.model.language_model.recompute = recompute
        self.optimizer = make_optimizer(self.model, ADAM)
        self.norm = GradientNorm(self.model, meshes.weights["shard"].get_group())
        if (source / "config.json").is_file():
            load_hf(self.model, source)
        else:
            load_checkpoint(source, self.model, self.optimizer)

    def step(self) -> tuple[float, float, dict[str, torch.Tensor]]:
        """-> loss, gradient norm before clipping, gradients after it"""
        loss = sum(loss_of(self.model, batch) for batch in BATCHES[dist.get_rank() :: RANKS])
        dist.all_reduce(loss)
        reduce_held_out(self.model)
        norm = self.norm.squares().sum().sqrt()
        self.norm.clip(norm, LIMIT)
        gradients = gradients_of(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), float(norm), gradients


CASES = {
    "fsdp 4": {},
    "ep 2 x fsdp 2": {"expert_parallel_size": 2},
    "ep 4": {"expert_parallel_size": 4},
    "ep 2, 2 replicas": {"expert_parallel_size": 2, "fully_shard_parallel_size": 2},
    "recomputed": {"expert_parallel_size": 2, "recompute": True},
    "frozen": {"expert_parallel_size": 2, "frozen": FROZEN},
    "looking ahead, recomputed": {"expert_parallel_size": 4, "mtp": True, "recompute": True},
}


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = {}
    for name, case in CASES.items():
        run = Sharded(folder / "hf", **case)
        steps = [run.step() for _ in range(STEPS)]
        losses, norms, gradients = zip(*steps, strict=True)
        weights = {n: full(p.detach()) for n, p in run.model.named_parameters()}
        found[name] = {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}
        found[name]["table"] = table(run.model)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()
    leave(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("experts")
    write_hf(whole_model().state_dict(), CONFIG, folder / "hf")
    mp.spawn(worker, args=(folder,), nprocs=RANKS)
    return torch.load(folder / "found.pt") | {"source": folder / "hf"}


@pytest.fixture(scope="module")
def references() -> dict:
    return {}


@pytest.mark.parametrize("name", CASES)
def test_four_processes_equal_one(found, references, name):
    of = CASES[name].get("mtp", False), tuple(CASES[name].get("frozen", ()))
    if of not in references:
        references[of] = reference(found["source"], *of)
    one, four = references[of], found[name]
    for kind in ("losses", "norms"):
        assert four[kind] == pytest.approx(one[kind], rel=1e-5), kind
    assert one["losses"][0] > one["losses"][-1]
    assert four["table"] == one["table"]
    for step in range(STEPS):
        same(one["gradients"][step], four["gradients"][step])
    same(one["weights"], four["weights"])
    assert not [n for n, g in four["gradients"][0].items() if "language_model" in n and "mlp.experts" in n and g[list(IDLE)].any()]
    assert all(g[: IDLE[0]].flatten(1).any(1).all() for n, g in one["gradients"][0].items() if "mlp.experts" in n)


def same(one: dict[str, torch.Tensor], four: dict[str, torch.Tensor]) -> None:
    assert one.keys() == four.keys()
    for name, value in one.items():
        difference = (four[name] - value).norm()
        assert difference <= 1e-5 * value.norm() + 1e-9, f"{name}: {difference / value.norm():.1e}"
