"""Adapters in every layout: real processes compute what one computes, from the same start."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import spawn
from peer import ONE_OF_EACH, config_dict, sample
from ports import free_port
from small_steps import collated, full, run_of, settings_of
from torch.distributed.tensor import DTensor

from qwen35.batch import PackedBatch
from qwen35.checkpoint.hf_names import saved_parameters
from qwen35.checkpoint.slices import TensorSlice, TensorSpec, fill
from qwen35.config.schema import LoraSettings
from qwen35.device import HOST, init_process
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import adapters_off, is_adapter
from qwen35.parallel.fsdp import REPLICATED
from qwen35.parallel.mesh import make_meshes
from qwen35.rank import leave
from qwen35.train import Run, distribute, train_step
from qwen35.training.adapters import InitialAdapters, build_model
from qwen35.training.flops import Flops
from qwen35.training.loss import token_weights

STEPS = 2  # in the first only B has gradients
MICRO_BATCHES = [[9, (4, 6), 8], [23], [30, (4, 4), 3], [11]]  # of each step
LORA = LoraSettings(
    r=8,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "shared_expert.*"),
    target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    expert_r=16,
)
TOWER = replace(LORA, target_modules=("attn.qkv", "linear_fc2", "in_proj_a"), target_parameters=(), expert_r=None)
PLAIN = {  # in one process
    "as it is": {},
    "three experts a token": {"top_k": 3},
    "tower": {"lora": TOWER},
    "bf16": {"dtype": "bf16"},
}
TWO = {
    "sharded": {},
    "replicated": {"fully_shard_parallel_size": 1},
    "recompute": {"recompute": True},
    "selective, on the host": {"recompute": "selective", "activation_offload": True, "optimizer": "adamw_swap"},
    "ulysses": {"ulysses_parallel_size": 2},
    "all-to-all": {"expert_parallel_size": 2, "recompute": True},
    "all-gather": {"expert_parallel_size": 2, "top_k": 3},
    "tower": {"lora": TOWER},
    "bf16": {"dtype": "bf16"},
    "bf16, experts": {"dtype": "bf16", "expert_parallel_size": 2},
}
FOUR = {
    "sharded": {},
    "2 x 2": {"fully_shard_parallel_size": 2, "ulysses_parallel_size": 2},
    "experts 2 x 2": {"expert_parallel_size": 2, "recompute": "selective"},
    "experts 2 x 2, three a token": {"fully_shard_parallel_size": 2, "expert_parallel_size": 2, "top_k": 3},
    "bf16": {"dtype": "bf16", "expert_parallel_size": 2},
}


class OfModel:
    """A TensorSource over a plain model's parameters."""

    def __init__(self, model: Qwen35):
        self.tensors = dict(model.named_parameters())
        self.specs = {name: TensorSpec(tuple(p.shape), p.dtype) for name, p in self.tensors.items()}

    def read(self, name: str, region: TensorSlice) -> torch.Tensor:
        return self.tensors[name].detach()[region.slices()]


def config_of(top_k: int) -> dict:
    return config_dict(num_experts_per_tok=top_k, **ONE_OF_EACH)


def batch_of(step: int, number: int) -> PackedBatch:
    return collated(sample(MICRO_BATCHES[number], seed=10 * step + number))


def some_steps(
    top_k: int = 2, lora: LoraSettings = LORA, dtype: str = "fp32", optimizer: str = "adamw", **parallel
) -> dict:
    """Losses and norms of all steps, gradients of each, adapters and dtypes after the last."""
    config = config_of(top_k)
    t = {"train_iters": STEPS, "lr": 1e-2, "weight_decay": 0.1, "adam_eps": 1e-4}
    settings = settings_of({}, parallel, optimizer=optimizer, dtype=dtype, lora=lora, **t)
    meshes = make_meshes(HOST.type, settings.parallel)
    model = build_model(settings, load_config(config))
    plain_flops = Flops(model).flops_per
    adam = distribute(settings, model, meshes, HOST)
    named = dict(model.named_parameters())
    fill({n: p for n, p in named.items() if not is_adapter(n)}, OfModel(Qwen35.from_config(config, seed=1)))
    fill(saved_parameters(model), InitialAdapters(saved_parameters(model), 5))
    initial = {n: full(p) for n, p in saved_parameters(model).items()}
    run = run_of(model, settings, meshes, adam)
    assert run.flops.flops_per == plain_flops
    found: dict = {"losses": [], "norms": [], "gradients": [], "initial": initial}
    adam.register_step_pre_hook(
        lambda *_: found["gradients"].append({n: full(p.grad) for n, p in named.items() if p.grad is not None})
    )
    numbers = range(meshes.data_rank, len(MICRO_BATCHES), meshes.data_size)
    for step in range(STEPS):
        record = train_step(run, [batch_of(step, i) for i in numbers], 1e-2, 0.0)
        dist.all_reduce(record.sums)
        found["losses"].append(float(record.sums[0]))
        found["norms"].append(dict(zip(run.gradients.groups, record.group_squares.sqrt().tolist(), strict=True)))
    if meshes.ulysses_size == 1:
        found["base"], found["trained"] = losses_of(run)
    found["adapters"] = {n: full(p) for n, p in saved_parameters(model).items()}
    found["frozen"] = {n: full(p) for n, p in named.items() if not is_adapter(n)}
    found["copied"] = [n for n, p in named.items() if not is_adapter(n) and isinstance(p, DTensor)]
    return found


@torch.no_grad()
def losses_of(run: Run) -> tuple[float, float]:
    """On a micro-batch of the first step, without the adapters in whatever state, and with them."""
    batch = batch_of(0, 0)
    weights = token_weights(batch, "default")
    with adapters_off(run.model):
        base = float(run.model.loss(batch, weights)[0])
    return base, float(run.model.loss(batch, weights)[0])


def worker(rank: int, world: int, port: int, out: Path, cases: dict[str, dict], steps: Callable[..., dict]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    init_process()
    found = {name: steps(**case) for name, case in cases.items()}
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()
    leave(0)


def run(folder: Path, world: int, cases: dict[str, dict], steps: Callable[..., dict] = some_steps) -> dict[str, dict]:
    """What `steps` finds in each case, by so many processes."""
    out = folder / f"{world}.pt"
    spawn(worker, world, free_port(), out, cases, steps, ranks=world)
    return torch.load(out)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("one"), 1, PLAIN)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("two"), 2, TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("four"), 4, FOUR)


def plain_case(case: dict) -> str:
    kept = {k: v for k, v in case.items() if k in ("top_k", "lora", "dtype")}
    return next(name for name, plain in PLAIN.items() if plain == kept)


@pytest.mark.parametrize("name", TWO)
def test_two_processes_equal_one(one, two, name):
    check(one[plain_case(TWO[name])], two[name], TWO[name])


@pytest.mark.parametrize("name", FOUR)
def test_four_processes_equal_one(one, four, name):
    check(one[plain_case(FOUR[name])], four[name], FOUR[name])


@pytest.mark.parametrize("name", PLAIN)
def test_one_process_trains_adapters_alone(one, name):
    """FSDP has no copy of the base, and every adapter has its gradients."""
    found = one[name]
    assert found["trained"] < found["base"] and not found["copied"]
    base = dict(Qwen35.from_config(config_of(PLAIN[name].get("top_k", 2)), seed=1).named_parameters())
    for parameter, value in found["frozen"].items():
        is_rounded = name == "bf16" and not parameter.endswith(REPLICATED)
        wanted = base[parameter].detach().to(torch.bfloat16 if is_rounded else torch.float32)
        assert torch.equal(value, wanted) and value.dtype == wanted.dtype, parameter
    for step, gradients in enumerate(found["gradients"]):
        assert gradients.keys() == found["adapters"].keys()
        for adapter, grad in gradients.items():
            assert bool(grad.any()) == (step > 0 or adapter.endswith("lora_B")), f"{adapter}, step {step + 1}"
    assert {len(norms) for norms in found["norms"]} == {len(found["adapters"]) // 2}
    assert all(norm > 0 for norms in found["norms"] for norm in norms.values())


def check(one: dict, found: dict, case: dict) -> None:
    """bf16 rounds sums of other parts of the tokens, and later steps go on from that."""
    is_rough = case.get("dtype") == "bf16"
    limit, steps = (2e-2, 1) if is_rough else (1e-5, STEPS)
    assert found["losses"] == pytest.approx(one["losses"], rel=limit)
    assert all(torch.equal(found["initial"][name], value) for name, value in one["initial"].items())
    for a, b in zip(one["norms"][:steps], found["norms"][:steps], strict=True):
        assert b == pytest.approx(a, rel=5 * limit)
    for kind in ("base", "trained") if "base" in found else ():
        assert found[kind] == pytest.approx(one[kind], rel=limit)
    assert found["frozen"].keys() == one["frozen"].keys()
    assert all(torch.equal(found["frozen"][name], value) for name, value in one["frozen"].items())
    for a, b in zip([*one["gradients"], one["adapters"]], [*found["gradients"], found["adapters"]], strict=True):
        assert a.keys() == b.keys()
        if is_rough and a is not one["gradients"][0]:
            continue
        for name, value in a.items():
            assert b[name].dtype == torch.float32
            assert (b[name] - value).norm() <= 5 * limit * value.norm() + 1e-9, name
