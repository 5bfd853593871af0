"""The KV cache: each step gives the hidden states of the whole text, and the model is restored."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from peer import config_dict, sample

from qwen35.batch import PackedBatch
from qwen35.inference.generate import _run_prompts, _run_tokens, steps
from qwen35.inference.generate import generate as greedy
from qwen35.inference.kv_cache import BLOCK, CachedAttention, CachedDeltaNet, caching
from qwen35.inference.sampling import Sampling
from qwen35.model import Qwen35
from qwen35.model.attention import AttentionCore
from qwen35.model.gated_delta_net import DeltaNetCore

STEPS = 6
# without their last STEPS tokens they are prompts: of 1 to 65 tokens, and two with images
WHOLE = [sample([n + STEPS], seed=n) for n in (1, 2, 3, 4, 63, 64, 65)]
WHOLE += [sample([5, (4, 4), 3, (2, 6), 7], seed=8), sample([(6, 4), 1 + STEPS], seed=9)]


@pytest.fixture(scope="module")
def build() -> Callable[..., Qwen35]:
    """Builds a model with no weight at its initial value."""

    def build(**kwargs) -> Qwen35:
        model = Qwen35.from_config(config_dict(**kwargs))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        return model

    return build


def first(text: PackedBatch, count: int) -> PackedBatch:
    return dataclasses.replace(
        text,
        input_ids=text.input_ids[:count],
        labels=text.labels[:count],
        position_ids=text.position_ids[:, :count],
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
    )


def in_steps(model: Qwen35, texts: list[PackedBatch], count: int) -> torch.Tensor:
    """hidden [count + 1, S, H] of each prompt's last token and of the tokens that follow."""
    with torch.inference_mode(), caching(model, count):
        hidden, position = _run_prompts(model, [first(t, len(t.input_ids) - count) for t in texts])
        tokens = torch.stack([t.input_ids[-count:] for t in texts], dim=1)  # [count, S]
        return torch.stack([hidden, *(_run_tokens(model, tokens[i], position + i) for i in range(count))])


def at_once(model: Qwen35, texts: list[PackedBatch], count: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(t)[-count - 1 :] for t in texts], dim=1)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm(dim=-1).div(theirs.norm(dim=-1)).max())


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (1, 3)], ids=str)
def test_cached_steps_equal_the_whole_text_at_once(build, moe, heads):
    model = build(moe=moe, key_heads=heads[0], value_heads=heads[1])
    ours, theirs = in_steps(model, WHOLE, STEPS), at_once(model, WHOLE, STEPS)
    assert error(ours, theirs) <= 2e-5
    assert error(ours[1:], theirs[:-1]) > 0.1  # a step apart they differ


def test_error_in_bf16_is_that_of_bf16(build):
    model = build(moe=False).bfloat16()
    ours, theirs = in_steps(model, WHOLE, STEPS), at_once(model, WHOLE, STEPS)
    exact = at_once(build(moe=False).bfloat16().float(), WHOLE, STEPS)
    assert ours.dtype == torch.bfloat16
    assert error(ours, exact) <= 1.5 * error(theirs, exact)


def test_cache_longer_than_a_block(build):
    model = build(moe=False)
    texts = [sample([BLOCK + 20], seed=1), sample([40], seed=2)]
    assert error(in_steps(model, texts, 30), at_once(model, texts, 30)) <= 2e-5


def test_cache_is_allocated_once(build, monkeypatch):
    model, seen = build(), []
    forward = CachedAttention.forward

    def watched(self, *args, **named):
        out = forward(self, *args, **named)
        seen.append((self.keys.data_ptr(), self.values.data_ptr(), self.keys.shape, self.keys.requires_grad))
        return out

    monkeypatch.setattr(CachedAttention, "forward", watched)
    greedy(model, [sample([9]), sample([4])], 12, ())
    assert len(seen) == 12 and len(set(seen)) == 1
    assert seen[0][2:] == ((2, 9 + 12 - 1, 2, 32), False)  # the last token needs no cache


def test_vision_tower_runs_once(build):
    model, runs = build(), []
    model.model.visual.register_forward_hook(lambda *_: runs.append(1))
    greedy(model, [sample([3, (4, 4), 2])], 5, ())
    assert len(runs) == 1


def cores(model: Qwen35) -> list[torch.nn.Module]:
    kinds = AttentionCore | DeltaNetCore | CachedAttention | CachedDeltaNet
    return [m for m in model.model.language_model.modules() if isinstance(m, kinds)]  # the vision tower's stay


def test_model_is_restored_afterwards(build):
    model, text = build(), sample([7])
    before, names = cores(model), list(model.state_dict())
    assert len(before) == 4
    greedy(model, [text], 3, ())
    assert cores(model) == before and list(model.state_dict()) == names
    abandoned = steps(model, [text], 3, (), Sampling())
    next(abandoned)
    assert len(cores(model)) == 8  # the caching ones, and inside of each the plain one
    with pytest.raises(RuntimeError, match="generating already"):
        greedy(model, [text], 3, ())
    abandoned.close()
    assert cores(model) == before
    with pytest.raises(IndexError):  # no such token
        greedy(model, [dataclasses.replace(text, input_ids=text.input_ids + 1000)], 3, ())
    assert cores(model) == before
    model(text).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head" not in name)
