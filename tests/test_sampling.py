"""What is drawn, against probabilities worked out one token at a time; and generation that draws."""

import math

import pytest
import torch
from peer import config_dict, sample

from qwen35.config import SettingError
from qwen35.generate import generate, greedy
from qwen35.model import Qwen35
from qwen35.sampling import Sampling, draw, pick

LOGITS = [0.3, -1.0, 2.0, 1.9, -4.0, 0.0, 1.1]


def direct(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Probability of each token: the softmax, cut to the k likeliest, renormalised, cut to the first that make up p, again."""
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
def test_the_distribution(temperature, top_k, top_p):
    """Points spread evenly over [0, 1) fall on each token as often as is its probability."""
    points = 20000
    at = (torch.arange(points) + 0.5) / points
    tokens = pick(torch.tensor(LOGITS).expand(points, -1), Sampling(temperature, top_k, top_p), at)
    shares = torch.bincount(tokens, minlength=len(LOGITS)) / points
    truth = direct(LOGITS, temperature, top_k, top_p)
    assert shares.tolist() == pytest.approx(truth, abs=1.5 / points)
    assert all(share == 0 for share, p in zip(shares.tolist(), truth, strict=True) if p == 0)


def test_the_points_are_spread_evenly():
    generators = Sampling(1.0, seed=3).generators(1)
    logits = torch.tensor([LOGITS])
    tokens = torch.cat([draw(logits, Sampling(1.0), generators) for _ in range(8000)])
    shares = torch.bincount(tokens, minlength=len(LOGITS)) / 8000
    assert shares.tolist() == pytest.approx(direct(LOGITS, 1.0, None, 1.0), abs=0.02)  # more than 3 standard deviations


@pytest.mark.parametrize("temperature", [1e-30, 1e-4])
@pytest.mark.parametrize("at", [0.0, 1 - 2**-24])
def test_the_ends(temperature, at):
    """Neither the last point nor the coldest temperature leads to a token that is out of question."""
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
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_what_no_distribution_has_is_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.fixture(scope="module")
def model() -> Qwen35:
    return Qwen35.from_config(config_dict(moe=False))


PROMPTS = [sample([5], seed=1), sample([2, (4, 4), 9], seed=2), sample([70], seed=3)]


def test_the_seed_decides(model):
    hot = [generate(model, PROMPTS, 20, (), Sampling(1.5, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert all(len(set(answer)) > 10 for answer in hot[0])
    alone = [generate(model, [prompt], 20, (), Sampling(1.5, seed=1))[0] for prompt in PROMPTS]
    assert alone == hot[0]  # whatever else is asked at the same time


def test_without_a_choice_it_is_greedy(model):
    likeliest = greedy(model, PROMPTS, 20, ())
    for sampling in (Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-6), Sampling(1e-6)):
        assert generate(model, PROMPTS, 20, (), sampling) == likeliest
    assert generate(model, PROMPTS, 20, (), Sampling(2.0)) != likeliest
