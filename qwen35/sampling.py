"""Which token comes next: the likeliest, or one drawn as temperature, top_k and top_p say."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen35.config import SettingError


@dataclass(frozen=True)
class Sampling:
    """top_k and top_p apply one after the other to the probabilities at this temperature, as in transformers and vLLM."""

    temperature: float = 0.0  # of the softmax; 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens; None: all
    top_p: float = 1.0  # only the likeliest tokens, as few as together have this probability
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises SettingError."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise SettingError(f"temperature {self.temperature} must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise SettingError(f"top_k {self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top_p {self.top_p} must be above 0, and at most 1")

        if not 0 <= self.seed < 2**63:
            raise SettingError(f"seed {self.seed} must be at least 0, and below 2^63")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def generators(self, count: int) -> list[torch.Generator]:
        """One a sequence, all of the same seed: what is drawn for a prompt does not depend on the others."""
        return [torch.Generator().manual_seed(self.seed) for _ in range(count)]


def draw(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """logits [S, V] -> the next token of each sequence [S] int64. The draws are the host's: the same on every device."""
    if sampling.is_greedy:
        return logits.argmax(-1)
    at = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    return pick(logits, sampling, at.to(logits.device))


def pick(logits: Tensor, sampling: Sampling, at: Tensor) -> Tensor:
    """The tokens that lie at `at` [S], in [0, 1), when the probabilities of logits [S, V] are laid end to end, the largest
    first -> [S] int64.
    """
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    largest, tokens = logits.float().topk(count, dim=-1)  # [S, k], falling
    probabilities = ((largest - largest[:, :1]) / sampling.temperature).softmax(-1)
    ends = probabilities.cumsum(-1)
    kept = (ends - probabilities < sampling.top_p).sum(-1, keepdim=True).clamp(min=1)  # those before it do not do
    chosen = (ends <= at[:, None] * ends.gather(-1, kept - 1)).sum(-1, keepdim=True)
    return tokens.gather(-1, torch.minimum(chosen, kept - 1)).squeeze(-1)
