"""Preference steps in every layout: real processes compute what one process computes."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from peer import ONE_OF_EACH, PATCH_VALUES, config_dict, sample
from small_steps import BIN, BUCKET, full, run_of, settings_of
from test_lora_parallel import OfModel, run

from qwen35.batch import PackedBatch
from qwen35.checkpoint.hf_names import saved_parameters
from qwen35.checkpoint.slices import fill
from qwen35.config.schema import DpoSettings, LoraSettings, LossCfg
from qwen35.data.collator import collate
from qwen35.data.dataset import Sample
from qwen35.device import HOST
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import is_adapter
from qwen35.parallel.mesh import make_meshes
from qwen35.train import distribute, train_step
from qwen35.training.adapters import InitialAdapters, build_model
from qwen35.training.dpo import METRICS

STEPS = 2
# of each step the micro-batches, of these the pairs' prompts and answers; one has none
MICRO_BATCHES = [[([9, (4, 6)], 8, 5)], [([4], 6, 9), ([2], 11, 5)], [], [([7, (4, 4), 3], 9, 8)]]
LORA = LoraSettings(r=8, target_modules=("q_proj", "o_proj"), target_parameters=("mlp.experts.down_proj",))
PLAIN: dict[str, dict] = {
    "all weights": {},
    "ipo": {"dpo": DpoSettings("ipo", beta=0.4, rpo_alpha=0.5)},
    "adapters": {"lora": LORA},
}
TWO: dict[str, dict] = {
    "sharded": {},
    "ulysses": {"ulysses_parallel_size": 2, "recompute": True},
    "ulysses, ipo": {"ulysses_parallel_size": 2, "dpo": PLAIN["ipo"]["dpo"]},
    "experts": {"expert_parallel_size": 2, "recompute": "selective"},
    "replicated": {"fully_shard_parallel_size": 1, "activation_offload": True},
    "adapters": {"lora": LORA},
    "adapters, ulysses": {"lora": LORA, "ulysses_parallel_size": 2, "recompute": True},
    "adapters, experts": {"lora": LORA, "expert_parallel_size": 2, "activation_offload": True},
}


def batch_of(step: int, number: int, with_reference: bool) -> PackedBatch:
    samples, seed = [], 100 * step + 10 * number
    for i, (prompt, *lengths) in enumerate(MICRO_BATCHES[number]):
        for side, length in enumerate(lengths):
            s = sample([*prompt, length], seed=seed + i)
            ids, labels = s.input_ids.clone(), torch.full_like(s.labels, -100)
            generator = torch.Generator().manual_seed(seed + 50 + 2 * i + side)
            ids[-length:] = torch.randint(0, 140, (length,), generator=generator)
            labels[-length - 1 : -1] = ids[-length:]
            samples.append(Sample(ids, labels, s.position_ids, s.pixel_values, s.grid_thw))
    batch = collate([samples], BIN, 0, BUCKET, load_config(config_dict()).vision_spec, PATCH_VALUES)
    pairs = torch.arange(len(samples)).view(-1, 2)
    reference = -40 - 5 * torch.rand(len(pairs), 2, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(batch, pairs=pairs, reference=reference if with_reference else None)


def some_steps(dpo: DpoSettings | None = None, lora: LoraSettings | None = None, **parallel) -> dict:
    """Sums over the ranks of all steps, norms, gradients of the first, weights after the last."""
    config = config_dict(**ONE_OF_EACH)
    t = {"train_iters": STEPS, "lr": 1e-2, "adam_eps": 1e-4, "dtype": "fp32", "stage": "dpo"}
    loss = {"loss_cfg": LossCfg(router_aux_loss_coef=0.1)}
    settings = settings_of(loss, parallel, lora=lora, dpo=dpo or DpoSettings(), **t)
    meshes = make_meshes(HOST.type, settings.parallel)
    model = build_model(settings, load_config(config))
    adam = distribute(settings, model, meshes, HOST)
    named = dict(model.named_parameters())
    fill({n: p for n, p in named.items() if not is_adapter(n)}, OfModel(Qwen35.from_config(config, seed=1)))
    if lora:
        fill(saved_parameters(model), InitialAdapters(saved_parameters(model), 5))
    run = run_of(model, settings, meshes, adam)
    found: dict = {"sums": [], "norms": [], "gradients": [], "load": []}
    adam.register_step_pre_hook(
        lambda *_: found["gradients"].append({n: full(p.grad) for n, p in named.items() if p.grad is not None})
    )
    numbers = range(meshes.data_rank, len(MICRO_BATCHES), meshes.data_size)
    for step in range(STEPS):
        record = train_step(run, [batch_of(step, i, not lora) for i in numbers], 1e-2, 0.0)
        dist.all_reduce(record.sums)
        dist.all_reduce(record.load)
        assert record.also == METRICS
        found["sums"].append(record.sums)
        found["load"].append(record.load)
        found["norms"].append(record.group_squares.sqrt())
    found["weights"] = {n: full(p) for n, p in saved_parameters(model).items()}
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("one"), 1, PLAIN, some_steps)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("two"), 2, TWO, some_steps)


@pytest.mark.parametrize("name", TWO)
def test_two_processes_equal_one(one, two, name):
    """One process accumulates over four micro-batches, two over two each, or share all four."""
    wanted = {k: v for k, v in TWO[name].items() if k in ("dpo", "lora")}
    plain, found = one[next(name for name, case in PLAIN.items() if case == wanted)], two[name]
    for a, b in zip(plain["sums"], found["sums"], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), (a, b)
    for a, b in zip(plain["load"], found["load"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain["norms"], found["norms"], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert len(plain["gradients"]) == STEPS
    for a, b in zip([plain["gradients"][0], plain["weights"]], [found["gradients"][0], found["weights"]], strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert (b[key] - value).norm() <= 1e-4 * value.norm() + 1e-8, key


def test_the_rewards_of_new_adapters_are_zero(one):
    loss, rewards = (one["adapters"]["sums"][0][part] for part in (0, slice(5, 9)))
    assert not rewards.any() and float(loss) == pytest.approx(0.6931472)
