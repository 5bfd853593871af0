"""Four real processes with every way to shard the experts, against one plain model without FSDP."""

import functools
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import save_checkpoint
from forked import spawn
from hf_folder import write_hf
from peer import ONE_OF_EACH, config_dict, pack, sample
from small_steps import full
from torch.utils._python_dispatch import TorchDispatchMode

from qwen35.batch import PackedBatch
from qwen35.checkpoint import load_pretrained
from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.checkpoint.hf import load_hf
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.config.schema import ParallelSettings, TrainingSettings
from qwen35.model import Qwen35, load_config
from qwen35.parallel.fsdp import REPLICATED, reduce_replicated, shard
from qwen35.parallel.mesh import make_meshes
from qwen35.rank import leave
from qwen35.training.loss import make_mtp_targets, token_weights
from qwen35.training.optimizer import GradientNorm, make_optimizer
from qwen35.training.parameter_groups import freeze, parameter_table

RANKS, STEPS, AUX, LIMIT = 4, 2, 0.1, 0.05
RESUMED = 3  # steps, each on other meshes
# with three experts a token two ranks all-gather tokens, four exchange rows
CONFIG = config_dict(mtp_num_hidden_layers=1, num_experts_per_tok=3, **ONE_OF_EACH)
IDLE = (6, 7)  # never chosen: with two experts per rank the last rank gets no tokens
ADAM = TrainingSettings(train_iters=RESUMED, save="x", lr=1e-2, weight_decay=0.1, adam_eps=1e-4)
FROZEN = ["model.visual", "model.language_model.layers.{*}.mlp.gate", "model.language_model.layers.0.mlp.experts"]


def batches() -> list[PackedBatch]:
    """Eight micro-batches of 40 tokens; ranks 1 and 3 get no images, rank 3 no labels."""
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
    """Random weights; hidden states share a direction that the idle experts' router rows avoid."""
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
    """Its part of the mean loss over all micro-batches, with load balancing; runs backward."""
    mtp_targets = make_mtp_targets(batch, "default") if hasattr(model, "mtp") else None
    loss, aux, _ = model.loss(batch, token_weights(batch, "default"), mtp_targets, 0.3)
    both = (loss + AUX * aux) / len(BATCHES)
    both.backward()
    return both.detach()


def gradients_of(model: Qwen35) -> dict[str, torch.Tensor]:
    return {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def result(model: Qwen35, losses: list[float], norms: list[float], gradients: dict) -> dict:
    """Losses and norms of all steps, clipped gradients of the first, weights after the last."""
    weights = {n: full(p) for n, p in model.named_parameters()}
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "weights": weights,
        "table": parameter_table(model),
    }


def reference(source: Path, mtp: bool, frozen: Sequence[str], steps: int = STEPS) -> dict:
    """One process, plain tensors, torch's own clipping."""
    model = load_pretrained(source, torch.float32, mtp=mtp)
    freeze(model, frozen)
    optimizer = make_optimizer(model, ADAM)
    losses, norms, gradients = [], [], {}
    for _ in range(steps):
        losses.append(float(sum(loss_of(model, batch) for batch in BATCHES)))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)))
        gradients = gradients or gradients_of(model)
        optimizer.step()
        optimizer.zero_grad()
    return result(model, losses, norms, gradients)


class Sharded:
    """A model on this rank with its optimizer and meshes."""

    def __init__(
        self, source: Path, mtp: bool = False, frozen: Sequence[str] = (), recompute: bool | str = False, **parallel
    ):
        meshes = make_meshes("cpu", ParallelSettings(**parallel))
        with torch.device("meta"):
            self.model = Qwen35(load_config(CONFIG), mtp=mtp)
        freeze(self.model, frozen)
        shard(self.model, meshes, torch.float32)
        self.model.to_empty(device="cpu")
        self.model.recompute(recompute)
        self.optimizer = make_optimizer(self.model, ADAM)
        self.norm = GradientNorm(self.model, meshes.weights["shard"].get_group())
        if (source / "config.json").is_file():
            load_hf(self.model, source)
        else:
            load_checkpoint(source, self.model, self.optimizer)

    def steps(self, count: int) -> dict:
        losses, norms, gradients = [], [], {}
        for _ in range(count):
            loss, norm = self.backward()
            losses.append(loss)
            norms.append(norm)
            gradients = gradients or gradients_of(self.model)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return result(self.model, losses, norms, gradients)

    def backward(self) -> tuple[float, float]:
        """All micro-batches, clipped -> their loss, the gradients' norm."""
        loss = sum(loss_of(self.model, batch) for batch in BATCHES[dist.get_rank() :: RANKS])
        dist.all_reduce(loss)
        reduce_replicated(self.model)
        norm = self.norm.squares().sum().sqrt()
        self.norm.clip(norm, LIMIT)
        return float(loss), float(norm)


CASES = {
    "fsdp 4": {},
    "ep 2 x fsdp 2": {"expert_parallel_size": 2},
    "ep 2, 2 replicas": {"expert_parallel_size": 2, "fully_shard_parallel_size": 2},
    "recomputed": {"expert_parallel_size": 2, "recompute": True},
    "frozen": {"expert_parallel_size": 2, "frozen": FROZEN},
    "ep 4, looking ahead, selective": {"expert_parallel_size": 4, "mtp": True, "recompute": "selective"},
}


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=r".*returned a view tensor|.*is deprecated")  # users would see them
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = {}
    for name, case in CASES.items():
        found[name] = Sharded(folder / "hf", **case).steps(STEPS)
    found["gathers"] = {kept: gathers(folder / "hf", kept) for kept in (False, True)}
    found["read"] = {layout: bytes_read(folder / layout) for layout in ("hf", "per_expert")}
    found["resumed"] = resumed(folder)
    found["seconds"] = patience(4000.0)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()
    leave(0)


class Gathers(TorchDispatchMode):
    """Counts FSDP2's all-gathers by the elements that a rank contributes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather_base" in str(function):
            self.counts[args[1].numel()] += 1
        return function(*args, **(kwargs or {}))


def gathers(source: Path, recompute: bool) -> float:
    """How often the weights of a layer's experts are gathered per micro-batch."""
    run = Sharded(source, recompute=recompute, expert_parallel_size=2)
    layers = run.model.model.language_model.layers
    own = sum(p.to_local().numel() for p in layers[0].mlp.experts.parameters())
    with Gathers() as seen:
        loss_of(run.model, BATCHES[dist.get_rank()])
    return seen.counts[own] / len(layers)


def bytes_read(source: Path) -> int:
    """Written by all ranks, for two copies of the weights."""
    count, preadv = 0, os.preadv

    def counting(fd, buffers, offset):
        nonlocal count
        got = preadv(fd, buffers, offset)
        count += got
        return got

    os.preadv = counting
    Sharded(source, mtp=True, expert_parallel_size=2, fully_shard_parallel_size=2)
    os.preadv = preadv
    total = torch.tensor([count])
    dist.all_reduce(total)
    return int(total)


def resumed(folder: Path) -> dict:
    """Three steps, each from the last one's checkpoint on other meshes; the final bytes."""
    steps, source = [], folder / "hf"
    for step, parallel in enumerate(
        [
            {"expert_parallel_size": 2, "fully_shard_parallel_size": 2},
            {},
            {"expert_parallel_size": 4},
        ],
        1,
    ):
        run = Sharded(source, **parallel)
        steps.append(run.steps(1))
        source = save_checkpoint(folder / "run", step, run.model, run.optimizer)
    courses = {kind: [s[kind][0] for s in steps] for kind in ("losses", "norms")}
    return steps[0] | courses | {"weights": steps[-1]["weights"]}


def patience(seconds: float) -> dict[str, float]:
    """The timeout of each group of the meshes."""
    meshes = make_meshes("cpu", ParallelSettings(expert_parallel_size=2, fully_shard_parallel_size=2), seconds)
    groups = {
        f"{kind} {name}": getattr(meshes, kind)[name].get_group()
        for kind in ("weights", "experts", "tokens")
        for name in getattr(meshes, kind).mesh_dim_names
    }
    assert groups.pop("tokens data") is dist.group.WORLD  # whose timeout was set when it was made
    return {
        name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for name, group in groups.items()
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("experts")
    write_hf(whole_model().state_dict(), CONFIG, folder / "hf")
    write_hf(whole_model().state_dict(), CONFIG, folder / "per_expert", layout="per_expert")
    spawn(worker, folder, ranks=RANKS)
    return torch.load(folder / "found.pt") | {"folder": folder}


@pytest.fixture(scope="module")
def reference_of(found):
    return functools.cache(functools.partial(reference, found["folder"] / "hf"))


@pytest.mark.parametrize("name", CASES)
def test_four_processes_equal_one(found, reference_of, name):
    one, four = reference_of(CASES[name].get("mtp", False), tuple(CASES[name].get("frozen", ()))), found[name]
    check(one, four)
    assert one["losses"][0] > one["losses"][-1]
    of_experts = {n: g for n, g in four["gradients"].items() if "language_model" in n and "mlp.experts" in n}
    assert len(of_experts) == (2 if name == "frozen" else 4)
    for gradient in of_experts.values():
        assert gradient.flatten(1).any(1).tolist() == [e not in IDLE for e in range(len(gradient))]


def test_resumed_on_other_meshes(found, reference_of):
    check(reference_of(False, (), RESUMED), found["resumed"])


def test_replicas_are_written_once(found):
    """Checkpoints of two copies and of one copy of the weights are equal, except headers."""
    written = [
        sum(file.stat().st_size for file in (found["folder"] / "run" / f"iter_000000{step}").glob("*.distcp"))
        for step in (1, 2)
    ]
    wanted = 3 * sum(w.nbytes for w in found["fsdp 4"]["weights"].values())
    assert all(wanted < size < 1.6 * wanted for size in written), (written, wanted)


def test_each_rank_reads_its_own_slices(found):
    for layout, read in found["read"].items():
        specs = HFFolder(found["folder"] / layout).specs
        every_rank = sum(specs[n].nbytes for n in specs if n.endswith(REPLICATED))
        assert read == 2 * (sum(s.nbytes for s in specs.values()) + every_rank), layout


def test_mesh_groups_have_the_given_timeout(found):
    """Longer than torch's default of half an hour."""
    assert len(found["seconds"]) == 6 and set(found["seconds"].values()) == {4000.0}


def test_experts_are_gathered_twice(found):
    """Once in forward, and once in backward with its recomputation."""
    assert found["gathers"] == {False: 2, True: 2}


def check(one: dict, four: dict) -> None:
    for kind in ("losses", "norms"):
        assert four[kind] == pytest.approx(one[kind], rel=1e-5), kind
    for kind in ("gradients", "weights"):
        assert one[kind].keys() == four[kind].keys()
        for name, value in one[kind].items():
            difference = (four[kind][name] - value).norm()
            assert difference <= 1e-5 * value.norm() + 1e-9, f"{kind} of {name}: {difference / value.norm():.1e}"
    assert four["table"] == one["table"]
