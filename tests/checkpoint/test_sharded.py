"""Two ranks with a model sharded by FSDP2 load slices and save; any number of ranks resumes."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import build, save_checkpoint, state_of, write_folder
from forked import spawn
from hf_folder import LAYOUTS, write_hf
from peer import config_dict
from small_steps import full
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf import load_hf
from qwen35.checkpoint.hf_names import shapes_of
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.checkpoint.slices import PIECE_BYTES
from qwen35.model import Qwen35, load_config
from qwen35.rank import leave

RANKS = 2
ODD = {"shared_expert_intermediate_size": 41, "moe_intermediate_size": 25}  # does not divide by two
CONFIG = config_dict(mtp_num_hidden_layers=1, **ODD)
LARGE = config_dict(mtp_num_hidden_layers=1, vocab_size=600_000)
LARGE_BYTES = 50 * 2**20  # at least, of the largest tensors


def replicated(name: str) -> bool:
    """fp32 parameters that are replicated, as in training."""
    return name.endswith((".A_log", ".dt_bias", ".linear_attn.norm.weight", ".mlp.gate.weight"))


def placement(parameter: torch.Tensor) -> Shard:
    return Shard(1 if parameter.ndim == 3 and parameter.shape[1] > 1 else 0)


def sharded_model(config: dict = CONFIG) -> Qwen35:
    """Sharded by layer on the meta device, experts along their second axis, then allocated."""
    mesh = init_device_mesh("cpu", (RANKS,))
    with torch.device("meta"):
        model = Qwen35(load_config(config), mtp=True)
    ignored = {p for name, p in model.named_parameters() if replicated(name)}
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).fill_(float("nan"))
    return model


def own_bytes(model: torch.nn.Module) -> int:
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())


def memory(line: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{line}:")[1].split()[0]) * 1024


def check_memory(folder: Path) -> None:
    """While loading, a rank holds its own part and a few pieces: far less than a large tensor."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model = sharded_model(LARGE)
    load_hf(model, folder)
    assert HFFolder(folder).specs["lm_head.weight"].nbytes >= LARGE_BYTES
    assert memory("VmHWM") - before < own_bytes(model) + 6 * PIECE_BYTES < own_bytes(model) + LARGE_BYTES
    assert full(model.lm_head.weight)[-1].eq(1).all()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two steps of known gradients; the vision tower gets none."""
    for number in (1, 2):
        for name, parameter in model.named_parameters():
            if "visual" not in name:
                parameter.grad = parameter.detach() * number
        optimizer.step()


def worker(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    wanted = state_of(build(CONFIG))
    read_bytes = 0
    preadv = os.preadv

    def counting(fd, buffers, offset):
        nonlocal read_bytes
        got = preadv(fd, buffers, offset)
        read_bytes += got
        return got

    os.preadv = counting
    for layout in LAYOUTS:
        model = sharded_model()
        assert sum(isinstance(p, DTensor) and p.to_local().numel() == 0 for p in model.parameters()) == 5 * rank
        read_bytes = 0
        load_hf(model, folder / layout)
        for name, parameter in model.named_parameters():
            assert torch.equal(full(parameter), wanted[name].float()), name
        # every byte is read once, except what both ranks hold
        total = torch.tensor([read_bytes])
        dist.all_reduce(total)
        twice = sum(t.nbytes for name, t in wanted.items() if replicated(name))
        assert total.item() == sum(t.nbytes for t in wanted.values()) + twice
    os.preadv = preadv
    check_memory(folder / "large")

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, optimizer)
    save_checkpoint(folder / "run", 2, model, optimizer, {"step": 2}, {"rank": rank, "rng": torch.get_rng_state()})
    resumed = sharded_model()
    other = torch.optim.AdamW(resumed.parameters(), lr=0.01, weight_decay=0.1)
    loaded = load_checkpoint(folder / "run", resumed, other)
    assert (loaded.step, loaded.extra, loaded.rank_extra["rank"]) == (2, {"step": 2}, rank)
    train(model, optimizer)
    train(resumed, other)
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(full(a), full(b)), name

    # saved by one process, loaded by two
    alone = sharded_model()
    optimizer = torch.optim.AdamW(alone.parameters())
    loaded = load_checkpoint(folder / "alone", alone, optimizer)
    assert (loaded.world_size, loaded.rank_extra) == (1, None)
    reference = build(CONFIG, seed=1)
    state = torch.optim.AdamW(reference.parameters(), lr=0.01)
    train(reference, state)
    for (name, a), b in zip(alone.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(full(a), b), name
        assert (a in optimizer.state) == ("visual" not in name)
        if a in optimizer.state:
            assert torch.equal(full(optimizer.state[a]["exp_avg"]), state.state[b]["exp_avg"]), name
            assert optimizer.state[a]["step"] == 2

    # a failure on one rank is the same error on all, and leaves nothing behind
    with pytest.raises(CheckpointError, match=r"extra\.bad: object cannot be saved"):
        save_checkpoint(folder / "run", 3, model, None, rank_extra={"bad": object()} if rank == 1 else {})
    dist.barrier()
    if rank == 1:
        torch.save = broken_save
    with pytest.raises(CheckpointError, match=r"iter_0000003 cannot be written: No space left on device"):
        save_checkpoint(folder / "run", 3, alone, optimizer)
    dist.barrier()
    assert sorted(p.name for p in (folder / "run").iterdir()) == ["iter_0000002", "latest_checkpointed_iteration.txt"]
    (folder / f"done{rank}").touch()
    dist.destroy_process_group()
    leave(0)


def broken_save(*args, **kwargs):
    raise OSError(28, os.strerror(28))


def test_two_ranks_load_save_and_resume(tmp_path):
    with torch.device("meta"):
        large = shapes_of(Qwen35(load_config(LARGE), mtp=True).named_parameters())
    write_hf({n: torch.ones(s, dtype=torch.bfloat16) for n, s in large.items()}, LARGE, tmp_path / "large")
    for layout in LAYOUTS:
        write_folder(tmp_path / layout, layout=layout, shard_size=40_000, **ODD)
    alone = build(CONFIG, seed=1)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01)
    train(alone, optimizer)
    save_checkpoint(tmp_path / "alone", 7, alone, optimizer, rank_extra={"a": 1})
    spawn(worker, tmp_path, ranks=RANKS)
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()
    # saved by two, loaded by one
    reference = build(CONFIG)
    rounded = state_of(reference)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(rounded[name])
    train(reference, torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1))
    model = build(CONFIG, seed=3)
    loaded = load_checkpoint(tmp_path / "run", model, torch.optim.AdamW(model.parameters()))
    assert (loaded.world_size, loaded.rank_extra) == (2, None)
    for (name, a), b in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
