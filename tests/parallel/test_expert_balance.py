"""Where experts go by their loads, and that their rows arrive there and come back."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import spawn
from peer import ONE_OF_EACH, config_dict, pack, sample

from qwen35.config.schema import ParallelSettings, TrainingSettings
from qwen35.device import HOST
from qwen35.model import Qwen35, load_config
from qwen35.parallel.expert_balance import busiest, most_sent, move_rows, rebalance
from qwen35.parallel.fsdp import gather_weights, shard
from qwen35.parallel.mesh import make_meshes
from qwen35.rank import leave
from qwen35.training.expert_balance import KEY, ExpertBalance
from qwen35.training.optimizer import make_optimizer

RANKS, EXPERTS = 8, 256
OWN_ORDER = list(range(EXPERTS))
MOVED = [5, 0, 3, 1, 7, 2, 6, 4]  # of the small model's eight experts
PARALLEL = {
    "ep 4": {"expert_parallel_size": 4},
    "ep 2 x fsdp 2": {"expert_parallel_size": 2},
    "ep 2, 2 replicas": {"expert_parallel_size": 2, "fully_shard_parallel_size": 2},
}


def share(load: np.ndarray, slots: list[int], ranks: int) -> float:
    """The busiest rank's tokens over the mean, counted expert by expert."""
    of_rank = [0.0] * ranks
    for expert, slot in enumerate(slots):
        of_rank[slot // (len(slots) // ranks)] += load[expert]
    return max(of_rank) * ranks / sum(of_rank)


def three_times(spread: float, seed: int = 0) -> np.ndarray:
    """Loads: the first of 8 ranks gets three times its share; experts differ by `spread`."""
    generator = np.random.default_rng(seed)
    load = generator.lognormal(0, spread, EXPERTS)
    load[:32] *= 3 / 8 / load[:32].sum()
    load[32:] *= 5 / 8 / load[32:].sum()
    return np.round(load * 8e6)


@pytest.mark.parametrize("spread", [0.0, 0.3, 0.6])
def test_a_rank_with_three_times_its_share(spread):
    load = three_times(spread)
    assert busiest(load, OWN_ORDER, RANKS) == pytest.approx(3.0, abs=1e-3)
    slots = rebalance(load, OWN_ORDER, RANKS, goal=1.05)
    assert sorted(slots) == OWN_ORDER
    assert share(load, slots, RANKS) == pytest.approx(busiest(load, slots, RANKS)) and share(load, slots, RANKS) <= 1.05
    assert sum(a // 32 != b // 32 for a, b in zip(OWN_ORDER, slots, strict=True)) <= 64  # 224 in a random order
    assert most_sent(OWN_ORDER, slots, RANKS) <= 28
    assert all(b == a for a, b in enumerate(slots) if b // 32 == a // 32)  # nobody moves within a rank


def test_only_the_busy_swap_and_nobody_does_in_vain():
    load = three_times(0.3)
    once = rebalance(load, OWN_ORDER, RANKS, goal=1.05)
    assert rebalance(load, once, RANKS, goal=1.05) == once
    assert rebalance(np.full(EXPERTS, 7.0), OWN_ORDER, RANKS, goal=1.0) == OWN_ORDER
    assert rebalance(np.zeros(EXPERTS), OWN_ORDER, RANKS, goal=1.0) == OWN_ORDER
    assert busiest(np.zeros(EXPERTS), OWN_ORDER, RANKS) == 0


def test_one_expert_that_is_too_much_for_a_rank_stays_with_idle_ones():
    """Moving cannot do better: that would take a second copy of the expert."""
    load = np.full(EXPERTS, 100.0)
    load[5] = 100 * EXPERTS
    slots = rebalance(load, OWN_ORDER, RANKS, goal=1.05)
    assert sorted(slots) == OWN_ORDER
    best = (load[5] + 31 * 100) * RANKS / load.sum()
    assert share(load, slots, RANKS) == pytest.approx(best)


# -- four processes --------------------------------------------------------------------------------


def whole() -> Qwen35:
    return Qwen35.from_config(config_dict(num_experts_per_tok=2, **ONE_OF_EACH), seed=1)


def loss_of(model: Qwen35, seed: int) -> torch.Tensor:
    batch = pack([sample([9, (4, 4), 6 + seed], seed=seed), sample([15 - seed], seed=seed + 1)])
    return model.loss(batch, torch.full((len(batch.labels),), 0.01))[0]


def balanced(optimizer: str, **parallel: int) -> dict:
    """A model that moves its experts, takes a step, moves them back; and one that does not move."""
    t = TrainingSettings(train_iters=1, save="x", lr=1e-2, adam_eps=1e-4, optimizer=optimizer, expert_balance=1.1)
    meshes = make_meshes(HOST.type, ParallelSettings(**parallel))
    found: dict = {}
    for name, slots in (("moved", MOVED), ("unmoved", list(range(8)))):
        model = whole()
        shard(model, meshes, torch.float32, is_balanced=True)
        adam = make_optimizer(model, t)
        balance = ExpertBalance(model, adam, t.expert_balance, {})
        losses, sums = [], []
        for _ in range(2):
            balance._move([slots] * len(balance.layers))  # with moments in the second step
            plain = whole()
            gather_weights(model, plain)
            sums.append({n: p.detach().clone() for n, p in plain.named_parameters()})
            loss = loss_of(model, dist.get_rank())
            loss.backward()
            losses.append(loss.detach())
            adam.step()
            adam.zero_grad()
            balance._move(balance.own_order)
        states = {n: adam.state[p]["exp_avg"].full_tensor() for n, p in model.named_parameters() if "mlp.experts" in n}
        weights = {n: p.detach().full_tensor() for n, p in model.named_parameters() if "mlp.experts" in n}
        found[name] = {"losses": torch.stack(losses), "gathered": sums, "moments": states, "weights": weights}
    return found


def rows_and_back(seed: int) -> bool:
    """Tensors of several dtypes and shapes, over random slots, against indexing the whole."""
    generator = torch.Generator().manual_seed(seed)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    is_right = True
    old = torch.randperm(8, generator=generator).tolist()
    for shape, dtype in (((3, 4), torch.float32), ((5,), torch.bfloat16), ((0, 2), torch.float32)):
        experts = torch.randn(8, *shape, generator=generator).to(dtype)
        mine = experts[torch.tensor(old).argsort()].chunk(ranks)[rank].clone()
        new = torch.randperm(8, generator=generator).tolist()
        move_rows(mine, old, new, dist.group.WORLD, HOST)
        is_right &= torch.equal(mine, experts[torch.tensor(new).argsort()].chunk(ranks)[rank])
    return is_right


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    found: dict = {"rows": [rows_and_back(seed) for seed in range(5)]}
    for name, parallel in PARALLEL.items():
        found[name] = balanced("adamw_swap" if name == "ep 4" else "adamw", **parallel)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
    leave(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("balance")
    spawn(worker, folder, ranks=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


def test_rows_arrive_where_they_belong(found):
    assert all(all(of_rank["rows"]) for of_rank in found)


@pytest.mark.parametrize("name", PARALLEL)
def test_moved_experts_compute_the_same(found, name):
    for of_rank in found:
        moved, unmoved = of_rank[name]["moved"], of_rank[name]["unmoved"]
        assert torch.allclose(moved["losses"], unmoved["losses"], rtol=1e-6, atol=0)
        for kind in ("weights", "moments"):
            assert len(moved[kind]) == 4
            for key, value in moved[kind].items():
                wanted = unmoved[kind][key]
                assert wanted.any() and (value - wanted).norm() <= 1e-6 * wanted.norm(), f"{kind} of {key}"


@pytest.mark.parametrize("name", PARALLEL)
def test_a_gathered_model_has_its_experts_in_their_own_order(found, name):
    start = dict(whole().named_parameters())
    first, second = found[0][name]["moved"]["gathered"]
    assert first.keys() == start.keys() and all(torch.equal(first[n], p) for n, p in start.items())
    for key, value in found[0][name]["unmoved"]["gathered"][1].items():
        assert (second[key] - value).norm() <= 1e-6 * value.norm(), key


def test_a_model_knows_its_slots():
    """The state of a checkpoint for another number of ranks is not taken."""
    assert load_config(config_dict()).text.num_experts == len(MOVED)
    state = {"ranks": 3, "slots": torch.tensor([MOVED]), "counts": torch.ones(1, 8)}
    assert not ExpertBalance(torch.nn.Linear(2, 2), torch.optim.SGD([torch.ones(1)]), 1.2, {KEY: state}).layers
