"""Steps that some of the model or some of the data takes no part in, against transformers' model
with torch's AdamW.

Without images transformers does not run the tower: its parameters have no gradients, and neither
momentum nor weight decay moves them. A bin whose records are all broken counts for nothing, and a
step of such bins changes nothing.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import save_checkpoint
from forked import spawn
from peer import ONE_OF_EACH, config_dict, pair, peer_inputs, random_model, sample
from ports import free_port
from small_steps import collated, fill_from, full, run_of, settings_of

from qwen35.batch import PackedBatch
from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.config.schema import LossCfg, ParallelSettings, Settings
from qwen35.device import HOST, init_process
from qwen35.model import Qwen35, load_config
from qwen35.parallel.context_parallel import apply_context_parallel
from qwen35.parallel.fsdp import shard
from qwen35.parallel.mesh import make_meshes
from qwen35.rank import leave
from qwen35.train import Run, train_step
from qwen35.training.metrics import SUMS

LR, DECAY, EPS, CLIP = 1e-2, 0.1, 1e-4, 0.5
TEXT, IMAGE, BROKEN = [23], [9, (4, 6), 8], None
STEPS = [  # the micro-batches of two ranks, alternating
    [IMAGE, IMAGE, TEXT, TEXT],
    [TEXT, TEXT, TEXT, TEXT],
    [TEXT, TEXT, BROKEN, IMAGE],  # only on the second rank
    [TEXT, BROKEN, TEXT, TEXT],
    [TEXT, TEXT, TEXT, BROKEN],
    [BROKEN, BROKEN, BROKEN, BROKEN],
    [IMAGE, BROKEN, BROKEN, BROKEN],
]
WITH_IMAGES, EMPTY = [0, 2, 6], 5
CASES = {  # parallel settings and optimizer of two processes
    "sharded": ({}, "adamw"),
    "replicas": ({"fully_shard_parallel_size": 1}, "adamw_swap"),
    "ulysses": ({"ulysses_parallel_size": 2}, "adamw_swap"),
    "experts": ({"expert_parallel_size": 2}, "adamw"),
}


def config(moe: bool) -> dict:
    return config_dict(moe=moe, **ONE_OF_EACH)


def sequence(step: int, number: int) -> PackedBatch:
    return sample(STEPS[step][number], seed=10 * step + number)


def steps_of(of_model: dict, parallel: dict, optimizer: str = "adamw") -> Settings:
    t = {"train_iters": len(STEPS), "lr": LR, "weight_decay": DECAY, "adam_eps": EPS, "clip_grad": CLIP}
    return settings_of(of_model, parallel, optimizer=optimizer, **t)


def own(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def all_steps(moe: bool, optimizer: str, folder: Path | None, **parallel: int) -> list[dict[str, torch.Tensor]]:
    """Weights, and this rank's part of the optimizer state, after each step.

    Step 4 resumes from a checkpoint in `folder`.
    """
    meshes, whole = make_meshes(HOST.type, ParallelSettings(**parallel)), random_model(config(moe))

    def start() -> Run:
        with torch.device("meta"):
            model = Qwen35(load_config(config(moe)))
        apply_context_parallel(model, meshes)
        shard(model, meshes, torch.float32)
        fill_from(model, whole)
        return run_of(model, steps_of({"loss_cfg": LossCfg("default", 0.0)}, parallel, optimizer), meshes)

    run, found = start(), []
    for step, kinds in enumerate(STEPS):
        numbers = range(meshes.data_rank, len(kinds), meshes.data_size)
        train_step(run, [collated(*[sequence(step, i)] if kinds[i] else []) for i in numbers], LR, 0.0)
        states = {
            f"{key}.{name}": own(value)
            for name, q in run.model.named_parameters()
            for key, value in run.optimizer.state[q].items()
        }
        found.append({n: full(q) for n, q in run.model.named_parameters()} | states)
        if step == 2 and folder:
            save_checkpoint(folder, 3, run.model, run.optimizer)
            run = start()
            load_checkpoint(folder, run.model, run.optimizer)
    return found


def worker(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    init_process()
    found = {
        name: all_steps(name == "experts", optimizer, folder / name, **parallel)
        for name, (parallel, optimizer) in CASES.items()
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
    leave(0)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, list]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("two")
    spawn(worker, free_port(), folder, ranks=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def transformers_steps(moe: bool) -> list[dict[str, torch.Tensor]]:
    """The same with transformers' model and torch's AdamW, over micro-batches with records."""
    ours, theirs = pair(config(moe))
    names = [name for name, _ in ours.named_parameters()]
    parameters = dict(theirs.named_parameters())
    groups = [[parameters[n] for n in names if (parameters[n].ndim > 1) == matrices] for matrices in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": DECAY}, {"params": groups[1], "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=EPS,
    )
    found = [{n: parameters[n].detach().clone() for n in names}]
    for step, kinds in enumerate(STEPS):
        whole = [i for i, kind in enumerate(kinds) if kind]
        for i in whole:
            s = sequence(step, i)
            (theirs(**peer_inputs(s), labels=s.input_ids[None]).loss / len(whole)).backward()
        assert all((p.grad is None) == (step not in WITH_IMAGES) for n, p in parameters.items() if "visual" in n)
        torch.nn.utils.clip_grad_norm_([p for p in parameters.values() if p.grad is not None], CLIP)
        optimizer.step()
        optimizer.zero_grad()
        states = {f"step.{n}": optimizer.state[parameters[n]]["step"].clone() for n in names}
        found.append({n: parameters[n].detach().clone() for n in names} | states)
    return found


@pytest.fixture(scope="module")
def peer() -> dict[bool, list]:
    return {moe: transformers_steps(moe) for moe in (False, True)}


def check(found: list[dict[str, torch.Tensor]], peer: list[dict[str, torch.Tensor]]) -> None:
    first = peer[0]
    for step, (mine, theirs) in enumerate(zip(found, peer[1:], strict=True)):
        for name, before in first.items():
            moved, off = (theirs[name] - before).norm(), (mine[name] - theirs[name]).norm()
            assert off <= 2e-3 * moved + 1e-7, f"{name} after step {step + 1}: off by {off:.1e}, moved by {moved:.1e}"
            assert mine[f"step.{name}"] == theirs[f"step.{name}"], name
    for step in set(range(1, len(STEPS))) - set(WITH_IMAGES):
        before, after = found[step - 1 : step + 1]
        for name, value in after.items():
            stays = "visual" in name or step == EMPTY or not value.numel()  # a rank may have no part of a state
            assert torch.equal(value, before[name]) == stays, f"{name} in step {step + 1}"


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_swap"])
def test_one_process_equals_transformers(alone, peer, optimizer, tmp_path):
    check(all_steps(False, optimizer, tmp_path), peer[False])


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_transformers(two, peer, name):
    for found in two:
        check(found[name], peer[name == "experts"])


def test_resume_is_bit_exact(alone, tmp_path):
    """Nor does the device of the moments change a bit."""
    resumed, through = all_steps(False, "adamw_swap", tmp_path), all_steps(False, "adamw", None)
    for a, b in zip(resumed, through, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["default", "per_sample_loss", "per_token_loss"])
def test_a_padding_micro_batch_changes_nothing(alone, kind):
    """Losses, counts, expert load, FLOPs and gradients equal those of a step without it."""
    meshes, loss_cfg = make_meshes(HOST.type, ParallelSettings()), LossCfg(kind, 0.1)
    settings = steps_of({"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3, "loss_cfg": loss_cfg}, {})
    batches = [collated(sample([12, (4, 4), 5], seed=1), sample([7], seed=2)), collated(sample([30], seed=3))]
    results = []
    for given in (batches, [batches[0], collated(), batches[1], collated()]):
        model = Qwen35.from_config(config(True), seed=1, mtp=True)
        gradients: dict[str, torch.Tensor] = {}
        run = run_of(model, settings, meshes)

        def keep(*_, model=model, gradients=gradients) -> None:
            gradients.update((name, p.grad.clone()) for name, p in model.named_parameters())

        run.optimizer.register_step_pre_hook(keep)
        results.append((train_step(run, given, LR, 0.0), gradients))
    (wanted, theirs), (found, ours) = results
    assert dict(zip((*SUMS, *wanted.also), wanted.sums.tolist(), strict=True))["aux_loss"] > 0.5
    torch.testing.assert_close(found.sums, wanted.sums, rtol=1e-6, atol=0)
    assert torch.equal(found.load, wanted.load) and found.flops == wanted.flops
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()), msg=name)
