"""Preference losses against the formulas of trl's DPOTrainer, on transformers' model."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peer import ONE_OF_EACH, config_dict, pack, pair, peer_inputs, sample

from qwen35.batch import PackedBatch
from qwen35.config.schema import DpoSettings
from qwen35.model import Qwen35
from qwen35.model.lora import LoraSpec, add_adapters, is_adapter
from qwen35.training.dpo import METRICS, answer_log_probs, pair_losses, preference_loss
from qwen35.training.flops import Flops
from qwen35.training.loss import divisors

ALONE = SimpleNamespace(ulysses_rank=0, ulysses_size=1)
ONE = torch.ones(())
PAIRS = [([12, (4, 4), 5], 7, 3), ([9], 2, 11), ([4, (2, 4, 4), 3], 5, 5)]  # prompt, tokens of both answers
LOSSES = [
    DpoSettings(),
    DpoSettings(beta=0.5, label_smoothing=0.2, rpo_alpha=0.3),
    DpoSettings("ipo", beta=0.3),
    DpoSettings("ipo", rpo_alpha=1.0),
]


def answer(prompt: list, tokens: int, seed: int) -> PackedBatch:
    """A prompt, the same for all seeds, and an answer, which alone has labels."""
    whole = sample([*prompt, tokens], seed=len(prompt))
    ids = whole.input_ids.clone()
    ids[-tokens:] = torch.randint(0, 140, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[-tokens - 1 : -1] = ids[-tokens:]
    return dataclasses.replace(whole, input_ids=ids, labels=labels)


def pairs_of(numbers: list[int]) -> list[PackedBatch]:
    """chosen, rejected, chosen, …"""
    return [
        answer(prompt, tokens, 10 * number + side)
        for number in numbers
        for prompt, *lengths in [PAIRS[number]]
        for side, tokens in enumerate(lengths)
    ]


def batch_of(samples: list[PackedBatch], reference: torch.Tensor | None = None) -> PackedBatch:
    """Packed in another order, behind a sequence of no pair, without labels."""
    order = [*range(len(samples))[::-1]]
    other = dataclasses.replace(sample([6], seed=99), labels=torch.full((6,), -100))
    rows = torch.tensor([order.index(i) + 1 for i in range(len(samples))], dtype=torch.int64).view(-1, 2)
    return dataclasses.replace(pack([other, *(samples[i] for i in order)]), pairs=rows, reference=reference)


def trl_log_probs(theirs: torch.nn.Module, samples: list[PackedBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """[Q, 2] each: sums over the completion's tokens, and their number."""
    found = []
    for s in samples:
        log_probs = theirs(**peer_inputs(s)).logits[0].log_softmax(-1)
        mask = s.labels != -100
        found.append((log_probs[mask].gather(1, s.labels[mask, None]).sum(), mask.sum()))
    sums, tokens = zip(*found, strict=True)
    return torch.stack(sums).view(-1, 2), torch.stack(tokens).view(-1, 2)


def trl_losses(logps: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor, d: DpoSettings) -> torch.Tensor:
    """Of DPOTrainer 1.16: sigmoid, ipo, and of one pair sft; label_smoothing as before 1.0."""
    chosen_scores, rejected_scores = (logps - reference).unbind(1)
    delta_score = chosen_scores - rejected_scores
    if d.loss == "ipo":
        ipo_delta = chosen_scores / tokens[:, 0] - rejected_scores / tokens[:, 1]
        losses = (ipo_delta - 1 / (2 * d.beta)) ** 2
    else:
        losses = (
            -F.logsigmoid(d.beta * delta_score) * (1 - d.label_smoothing)
            - F.logsigmoid(-d.beta * delta_score) * d.label_smoothing
        )
    return losses + d.rpo_alpha * -(logps[:, 0] / tokens[:, 0])


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_losses_and_gradients_are_those_of_trl_on_transformers_model(moe):
    ours, theirs = pair(config_dict(moe=moe, tied=moe, **ONE_OF_EACH))
    samples = pairs_of([0, 1, 2])
    logps, tokens = trl_log_probs(theirs, samples)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(5))
    reference = logps.detach() + noise
    for dpo in LOSSES:
        wanted = trl_losses(logps, reference, tokens, dpo).mean()
        theirs.zero_grad()
        wanted.backward(retain_graph=True)
        load = torch.zeros(2, 8) if moe else None
        batch = batch_of(samples, reference)
        loss, aux, found = preference_loss(ours, batch, dpo, ALONE, torch.tensor(1 / 3), load)
        ours.zero_grad()
        loss.backward()
        assert torch.isclose(loss, wanted, rtol=1e-5) and torch.isclose(found[0], wanted, rtol=1e-5)
        by_name = dict(theirs.named_parameters())
        for name, p in ours.named_parameters():
            other = by_name[name].grad
            assert (p.grad - other).norm() <= 1e-5 * other.norm() + 1e-9, (dpo, name)
        rewards = dpo.beta * -noise
        assert torch.allclose(found[1] + found[2], rewards.sum() / 3, rtol=1e-4)
        values = dict(zip(METRICS, found[1:], strict=True))
        assert torch.isclose(values["rewards/margins"], (rewards[:, 0] - rewards[:, 1]).mean(), rtol=1e-4)
        assert values["rewards/accuracies"] == (rewards[:, 0] > rewards[:, 1]).float().mean()
        assert torch.isclose(values["logps/chosen"], logps[:, 0].mean(), rtol=1e-5)
        assert torch.isclose(values["logps/rejected"], logps[:, 1].mean(), rtol=1e-5)
        assert torch.equal(aux, ours.loss(batch, torch.zeros(len(batch.labels)))[1])
        assert not moe or load.sum() == 2 * 2 * len(batch.labels)


def test_the_reference_of_adapters_is_the_base():
    config = config_dict(**ONE_OF_EACH)
    base, adapted = Qwen35.from_config(config, seed=1), Qwen35.from_config(config, seed=1)
    add_adapters(adapted, LoraSpec(8, 16.0, ("q_proj", "in_proj_qkv"), ("experts.down_proj",), (), 8, False))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if is_adapter(name):
                p.normal_(0, 0.3)
    adapted.recompute(True)
    samples = pairs_of([0, 1])
    batch = batch_of(samples)
    with torch.no_grad():
        reference, tokens = answer_log_probs(batch, base.log_probs(batch)[0], ALONE)
    assert tokens.tolist() == [[7, 3], [2, 11]]
    load = torch.zeros(2, 8)
    loss, _, found = preference_loss(adapted, batch, DpoSettings(), ALONE, ONE, load)
    given = preference_loss(adapted, batch_of(samples, reference), DpoSettings(), ALONE, ONE)
    assert torch.equal(loss, given[0]) and torch.equal(torch.stack(found), torch.stack(given[2]))
    assert found[3].abs() > 1e-3  # the adapters change something
    assert load.sum() == 2 * 2 * len(batch.labels)  # the reference's tokens are not counted
    assert adapted.model.language_model.recompute is True
    loss.backward()
    assert all((p.grad is not None) == is_adapter(name) for name, p in adapted.named_parameters())


def test_a_batch_without_pairs_has_no_loss_and_no_gradient():
    ours = Qwen35.from_config(config_dict(moe=False, **ONE_OF_EACH))
    batch = batch_of([], torch.zeros(0, 2))
    loss, _, found = preference_loss(ours, batch, DpoSettings(rpo_alpha=1.0), ALONE, ONE)
    loss.backward()
    assert loss == 0 and not torch.stack(found).any()
    assert all(p.grad is not None and not p.grad.any() for p in ours.model.language_model.parameters())
    assert divisors([batch, batch_of(pairs_of([0, 1]))], [None, None], "default") == [2.0, 0.0, 2.0]


def test_an_untrained_model_starts_at_log_2():
    zero, tokens = torch.tensor([[-3.0, -4.0]]), torch.tensor([[2.0, 3.0]])
    assert float(pair_losses(zero, zero, tokens, DpoSettings())) == pytest.approx(0.6931472)
    assert float(pair_losses(zero, zero, tokens, DpoSettings("ipo", beta=0.5))) == 1.0
    assert float(pair_losses(zero, zero, tokens, DpoSettings(rpo_alpha=2.0))) == pytest.approx(0.6931472 + 3)


def test_flops_of_pairs():
    """The head is computed twice, and the reference's forward pass counts where it runs."""
    config = config_dict(moe=False, **ONE_OF_EACH)
    plain, adapted = Qwen35.from_config(config), Qwen35.from_config(config)
    add_adapters(adapted, LoraSpec(8, 16.0, ("q_proj",), (), (), 8, False))
    batch = batch_of(pairs_of([1]), torch.zeros(1, 2))
    counts = (len(batch.labels), 13, 0)
    head, sft = 2 * 13 * 48 * 160, dataclasses.replace(batch, pairs=None)
    assert Flops(plain).of_batch(batch, counts, None) - Flops(plain).of_batch(sft, counts, None) == head
    batch = dataclasses.replace(batch, reference=None)
    frozen = Flops(plain.requires_grad_(False)).of_batch(sft, counts, None)
    more = Flops(adapted).of_batch(batch, counts, None) - Flops(adapted).of_batch(sft, counts, None)
    assert more == head + frozen
