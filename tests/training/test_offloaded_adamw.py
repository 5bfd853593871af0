"""AdamW with moments on the host: the same bits and checkpoints, two chunks on the device."""

import pytest
import torch
from checkpoint_cases import save_checkpoint
from live_bytes import LiveBytes
from peer import config_dict

from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.config.schema import TrainingSettings
from qwen35.model import Qwen35
from qwen35.training.adamw import AdamW, SwappedAdamW
from qwen35.training.optimizer import make_optimizer

KINDS = ("adamw", "adamw_swap")


def make(kind: str, chunk: int | None = None):
    model = Qwen35.from_config(config_dict(), seed=1)
    settings = TrainingSettings(train_iters=9, save="x", optimizer=kind, weight_decay=0.1, lr=1e-2, adam_eps=1e-4)
    optimizer = make_optimizer(model, settings)
    if chunk:
        optimizer.chunk = chunk
    return model, optimizer


def train(model, optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(model.parameters()):
            # one has its first gradient late, and one never has any
            if i and (i > 1 or step > 1):
                p.grad = torch.randn(p.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()


def same(one, two) -> None:
    (model, optimizer), (other, others) = one, two
    for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
        assert optimizer.state[p].keys() == others.state[q[1]].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, others.state[q[1]][key]) and value.dtype == others.state[q[1]][key].dtype, (
                name,
                key,
            )


@pytest.mark.parametrize("chunk", [64, 1000, 20_000, None])  # 1000: no multiple of where a tensor may be cut
def test_the_numbers_are_those_of_adamw_bit_for_bit(chunk):
    plain, swapped = make("adamw"), make("adamw_swap", chunk)
    assert type(plain[1]) is AdamW and type(swapped[1]) is SwappedAdamW
    model = Qwen35.from_config(config_dict(), seed=1)
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == matrices], "weight_decay": 0.1 * matrices}
        for matrices in (True, False)
    ]
    theirs = model, torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4, fused=True)
    for one in (plain, swapped, theirs):
        train(*one, range(4))
    same(theirs, plain)
    same(theirs, swapped)


@pytest.mark.parametrize(("first", "then"), [KINDS, KINDS[::-1]], ids=["to swap", "from swap"])
def test_each_resumes_from_the_other_ones_checkpoint(first, then, tmp_path):
    plain, before, after = make("adamw"), make(first), make(then)
    train(*plain, range(4))
    train(*before, range(2))
    save_checkpoint(tmp_path, 2, *before)
    load_checkpoint(tmp_path, *after)
    train(*after, range(2, 4))
    same(plain, after)


def test_two_chunks_of_moments_are_on_the_device():
    """On a CPU a step allocates the two chunk buffers, and four bytes for each step counter."""
    model, optimizer = make("adamw_swap", 4096)
    train(model, optimizer, range(3))
    for p in optimizer.state:
        p.grad = torch.ones_like(p)
    with LiveBytes() as live:
        optimizer.step()
    assert 2 * 2 * 4096 * 4 <= live.peak <= 2 * 2 * 4096 * 4 + 1024


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_group_is_unchanged(kind, monkeypatch):
    """Bit for bit, with moments and step counters; a false skip has no effect."""
    monkeypatch.setattr("qwen35.training.adamw.ROLLBACK_ELEMENTS", 3000)  # several parts
    masked, plain = make(kind, 5000), make(kind, 5000)
    for group in masked[1].param_groups:
        group["skip"] = torch.tensor(group["visual"])
    train(*masked, range(2))
    for name, p in masked[0].named_parameters():
        state = masked[1].state[p]
        assert "visual" not in name or not state or not (state["step"] or state["exp_avg"].any()), name
    for group in masked[1].param_groups:
        group["skip"] = torch.tensor(False)
    train(*masked, range(2, 3))
    for group in plain[1].param_groups:
        group["params"], kept = [], group["params"]
        if not group["visual"]:
            group["params"] = kept
        group["kept"] = kept
    train(*plain, range(2))
    for group in plain[1].param_groups:
        group["params"] = group.pop("kept")
    train(*plain, range(2, 3))
    same(masked, plain)
    before = [x.clone() for x in (*masked[0].parameters(), *(v for s in masked[1].state.values() for v in s.values()))]
    for group in masked[1].param_groups:
        group["skip"] = torch.tensor(True)
    train(*masked, range(3, 4))
    after = (*masked[0].parameters(), *(v for s in masked[1].state.values() for v in s.values()))
    assert len(before) > 100 and all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
