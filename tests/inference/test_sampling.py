"""Sampling against slow counts and transformers, and generation that samples."""

import dataclasses
import inspect
import math

import pytest
import torch
from peer import VOCAB, config_dict, continued, pair, peer_inputs, sample
from transformers.generation import logits_process as theirs

from qwen35.batch import PackedBatch, derive
from qwen35.config.load import SettingError
from qwen35.inference.generate import generate
from qwen35.inference.sampling import Penalties, Sampling, distribution, draw, pick
from qwen35.model import Qwen35

LOGITS = [0.3, -1.0, 2.0, 1.9, -4.0, 0.0, 1.1]


def direct(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Probability of each token: softmax, top_k, renormalized, top_p, renormalized."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[:top_k]
    total, sum_before, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if sum_before < top_p:
            kept.append(i)
        sum_before += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 0.01])
def test_tokens_follow_the_distribution(temperature, top_k, top_p):
    """Evenly spread points in [0, 1) give each token as often as its probability says."""
    points = 20000
    at = (torch.arange(points) + 0.5) / points
    tokens = pick(torch.tensor(LOGITS).expand(points, -1), Sampling(temperature, top_k, top_p), at)
    shares = torch.bincount(tokens, minlength=len(LOGITS)) / points
    truth = direct(LOGITS, temperature, top_k, top_p)
    assert shares.tolist() == pytest.approx(truth, abs=1.5 / points)
    assert all(share == 0 for share, p in zip(shares.tolist(), truth, strict=True) if p == 0)


def test_draws_follow_the_distribution():
    generators = Sampling(1.0, seed=3).generators(1)
    logits = torch.tensor([LOGITS])
    tokens = torch.cat([draw(logits, Sampling(1.0), generators) for _ in range(8000)])
    shares = torch.bincount(tokens, minlength=len(LOGITS)) / 8000
    assert shares.tolist() == pytest.approx(direct(LOGITS, 1.0, None, 1.0), abs=0.02)  # more than 3 standard deviations


@pytest.mark.parametrize("temperature", [1e-30, 1e-4])
@pytest.mark.parametrize("at", [0.0, 1 - 2**-24])
def test_the_ends_of_the_interval_give_possible_tokens(temperature, at):
    """The last point and the lowest temperature never give a token of probability zero."""
    logits = torch.tensor([[0.0, -math.inf, 5.0, -math.inf]])
    assert pick(logits, Sampling(temperature), torch.tensor([at])).item() == 2
    assert pick(logits, Sampling(1.0), torch.tensor([at])).item() == (0 if at else 2)
    many = torch.randn(1, 50000)
    assert pick(many, Sampling(1.0, top_k=7), torch.tensor([at])).item() in many.topk(7).indices


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.fixture(scope="module")
def model() -> Qwen35:
    return Qwen35.from_config(config_dict(moe=False))


PROMPTS = [sample([5], seed=1), sample([2, (4, 4), 9], seed=2), sample([70], seed=3)]


def test_a_seed_gives_the_same_answer(model):
    hot = [generate(model, PROMPTS, 20, (), Sampling(1.5, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert all(len(set(answer)) > 10 for answer in hot[0])
    alone = [generate(model, [prompt], 20, (), Sampling(1.5, seed=1))[0] for prompt in PROMPTS]
    assert alone == hot[0]  # whatever else is asked at the same time


def test_sampling_from_one_token_is_greedy(model):
    likeliest = generate(model, PROMPTS, 20, ())
    for sampling in (Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-6), Sampling(1e-6)):
        assert generate(model, PROMPTS, 20, (), sampling) == likeliest
    assert generate(model, PROMPTS, 20, (), Sampling(2.0)) != likeliest


TIES = torch.tensor(
    [
        [2.0, 2, 2, 2, 2, 2, 2, 2],  # all tie
        [0.0, 3, 1, 3, 1, 3, 1, -1],  # at the second, the fifth
        [4.0, -1, 4, -1, 0, 0, 0, 4],
        [5.0, -math.inf, 5, 1, 1, 1, -math.inf, 1],
    ]
)


def by_transformers(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities [S, V] after its own warpers, in the order of its generate()."""
    steps: list = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(theirs.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        logits = step(None, logits)
    return logits.softmax(-1)


def over_all(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Our probabilities [S, V]."""
    probabilities, tokens = distribution(logits, sampling)
    assert (probabilities.diff() <= 0).all()
    return torch.zeros(logits.shape).scatter(-1, tokens, probabilities)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 4, 5, 8, 20])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.5, 1.0])
def test_equal_tokens_are_kept_as_in_transformers(temperature, top_k, min_p):
    """top_p may keep some of several equal tokens: as many as transformers (unstable sort)."""
    many = torch.randint(-4, 5, (5, 300), generator=torch.Generator().manual_seed(1)).float()
    for top_p in (1.0, 0.95, 0.7, 0.3):
        sampling = Sampling(temperature, top_k, top_p, min_p)
        for logits in (TIES, many, many.to(torch.bfloat16) / 3):
            ours, wanted = over_all(logits, sampling), by_transformers(logits.float(), sampling)
            kept = [logits.where(p > 0, -math.inf).sort(-1).values for p in (ours, wanted)]
            assert torch.equal(*kept)
            torch.testing.assert_close(ours.sort(-1).values, wanted.sort(-1).values, rtol=1e-5, atol=1e-7)
            if top_p == 1 or logits is TIES:
                torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


def test_ties_with_the_last_of_top_k_are_kept():
    at = (torch.arange(300) + 0.5) / 300
    drawn = pick(TIES[1].expand(300, -1), Sampling(1e-3, top_k=2), at)
    assert torch.bincount(drawn, minlength=8).tolist() == [0, 100, 0, 100, 0, 100, 0, 0]


def last_logits(model: Qwen35, prompt: PackedBatch, answer: list[int]) -> torch.Tensor:
    """Logits [V] after the prompt and these tokens, uncached; new tokens are never images."""
    prompt, count = derive(prompt, model.config.vision_spec), len(answer)
    after = prompt.position_ids.max() + 1 + torch.arange(count)
    whole = dataclasses.replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, torch.tensor(answer, dtype=torch.int64)]),
        labels=torch.cat([prompt.labels, torch.full((count,), -100)]),
        position_ids=torch.cat([prompt.position_ids, after.expand(3, -1)], dim=1),
        cu_seqlens=prompt.cu_seqlens + torch.tensor([0, count]),
        vision_index=torch.cat([prompt.vision_index, torch.full((count,), -1)]),
    )
    with torch.no_grad():
        return model.logits(whole)[-1]


@pytest.fixture(scope="module")
def both() -> tuple[Qwen35, torch.nn.Module]:
    return pair(config_dict(moe=False))


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.8])
def test_greedy_with_a_repetition_penalty_equals_transformers(both, penalty):
    ours, peer = both
    given = generate(ours, PROMPTS, 30, (), Sampling(repetition_penalty=penalty))
    for prompt, answer in zip(PROMPTS, given, strict=True):
        assert answer == continued(peer, peer_inputs(prompt), 30, repetition_penalty=penalty)
    assert given != generate(ours, PROMPTS, 30, ())


OPTIONS = {
    "penalty": {"repetition_penalty": 1.7},
    "published": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "all": {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.2, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_scores_are_those_of_transformers_generate(both, options):
    """The scores that generate() samples from, after all its processors, along its own tokens."""
    ours, peer = both
    options, prompt = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | OPTIONS[options], PROMPTS[1]
    inputs = {k: v for k, v in peer_inputs(prompt).items() if k in inspect.signature(peer.forward).parameters}
    words = {"do_sample": True, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    out = peer.generate(**inputs, max_new_tokens=8, **words, **options)
    path = out.sequences[0, len(prompt.input_ids) :]
    sampling = Sampling(**options | {"top_k": options["top_k"] or None})
    penalties = Penalties(sampling, [prompt.input_ids], VOCAB, torch.device("cpu"))
    for i, scores in enumerate(out.scores):
        logits = penalties.apply(last_logits(ours, prompt, path[:i].tolist())[None])
        torch.testing.assert_close(over_all(logits, sampling), scores.softmax(-1), rtol=1e-3, atol=1e-5)
        penalties.add(path[i : i + 1])


@pytest.mark.parametrize(("presence", "repetition"), [(0.3, 1.0), (2.0, 1.0), (0.5, 1.2), (-0.5, 1.0)])
def test_penalties_equal_a_slow_count(both, presence, repetition):
    """One prompt, one token at a time; prompts count for repetition, not for presence."""
    ours, _ = both
    given = generate(ours, PROMPTS, 20, (), Sampling(repetition_penalty=repetition, presence_penalty=presence))
    for prompt, answer in zip(PROMPTS, given, strict=True):
        slow: list[int] = []
        for _ in range(20):
            logits = last_logits(ours, prompt, slow).tolist()
            for token in {*prompt.input_ids.tolist(), *slow}:
                logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
            for token in set(slow):
                logits[token] -= presence
            slow.append(max(range(VOCAB), key=lambda i: logits[i]))
        assert answer == slow
    assert given != generate(ours, PROMPTS, 20, ())
