"""Which token comes next: the likeliest, or one drawn as temperature, top_k, top_p and min_p say, after penalties."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.host import to_device
from qwen35.config.load import SettingError


@dataclass(frozen=True)
class Sampling:
    """Each applies to what the one before leaves, in this order, as in transformers: the penalties, the temperature, top_k,
    top_p, min_p.
    """

    temperature: float = 0.0  # of the softmax; 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens, and those that are as likely as the last; None: all
    top_p: float = 1.0  # only the likeliest tokens, as few as together have this probability
    min_p: float = 0.0  # only tokens of at least so much of the likeliest one's probability
    repetition_penalty: float = (
        1.0  # what divides the positive logits of all tokens so far, and multiplies the negative
    )
    presence_penalty: float = 0.0  # what is taken off the logits of the answer's tokens so far
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises SettingError."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise SettingError(f"temperature {self.temperature} must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise SettingError(f"top_k {self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top_p {self.top_p} must be above 0, and at most 1")
        if not 0 <= self.min_p <= 1:
            raise SettingError(f"min_p {self.min_p} must be from 0 to 1")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise SettingError(f"repetition_penalty {self.repetition_penalty} must be above 0")
        if not math.isfinite(self.presence_penalty):
            raise SettingError(f"presence_penalty {self.presence_penalty} must be a number")
        if not 0 <= self.seed < 2**63:
            raise SettingError(f"seed {self.seed} must be at least 0, and below 2^63")

    def __str__(self) -> str:
        """What differs from greedy decoding without penalties."""
        names = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
        plain = Sampling()
        drawn = [] if self.is_greedy else [f"temperature {self.temperature:g}"]
        changed = [f"{name} {getattr(self, name):g}" for name in names if getattr(self, name) != getattr(plain, name)]
        seed = [] if self.is_greedy else [f"seed {self.seed}"]
        return ", ".join([*(drawn or ["greedy"]), *changed, *seed])

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def generators(self, count: int) -> list[torch.Generator]:
        """One a sequence, all of the same seed: what is drawn for a prompt does not depend on the others."""
        return [torch.Generator().manual_seed(self.seed) for _ in range(count)]


class Penalties:
    """Makes tokens that have been there less likely (or, by values the other way round, likelier).

    repetition_penalty is that of transformers' RepetitionPenaltyLogitsProcessor and of vLLM: the prompt's tokens count.
    presence_penalty, which transformers lacks, is that of the OpenAI API and of vLLM's apply_penalties: only what the model
    has written counts, each token once, and it comes after the repetition penalty.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Tensor], vocab_size: int, device: torch.device):
        """prompts: the ids of each, on the host."""
        self.repetition, self.presence = sampling.repetition_penalty, sampling.presence_penalty
        if self.repetition == 1 and self.presence == 0:
            return
        prompted = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
        for row, ids in zip(prompted, prompts, strict=True):
            row[ids] = True
        self.prompted = to_device(prompted, device)  # [S, V]
        self.answered = torch.zeros_like(self.prompted)
        self.ids = torch.arange(vocab_size, device=device)

    def apply(self, logits: Tensor) -> Tensor:
        """logits [S, V] -> the same in fp32, lowered where they are to be."""
        if self.repetition == 1 and self.presence == 0:
            return logits
        logits = logits.float()
        if self.repetition != 1:
            lowered = torch.where(logits < 0, logits * self.repetition, logits / self.repetition)
            logits = torch.where(self.prompted | self.answered, lowered, logits)
        return logits - self.presence * self.answered

    def add(self, tokens: Tensor) -> None:
        """The tokens [S] that have been chosen."""
        if self.repetition != 1 or self.presence != 0:
            self.answered |= tokens[:, None] == self.ids


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
    probabilities, tokens = distribution(logits, sampling)
    ends = probabilities.cumsum(-1)
    chosen = (ends <= at[:, None] * ends[:, -1:]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(-1, torch.minimum(chosen, last)).squeeze(-1)


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits [S, V] -> probabilities [S, C], falling, and the tokens [S, C] that have them; all others have none."""
    logits = logits.float()
    scores, tokens = _likeliest((logits - logits.amax(-1, keepdim=True)) / sampling.temperature, sampling.top_k)
    scores, order = scores.sort(dim=-1, stable=True)  # rising, as transformers cuts them, so that equal ones fall alike
    if sampling.top_p < 1:
        cut = scores.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        cut[:, -1] = False
        scores = scores.masked_fill(cut, -math.inf)
    if sampling.min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < sampling.min_p * probabilities[:, -1:], -math.inf)
    return scores.softmax(-1).flip(-1), tokens.gather(-1, order).flip(-1)


def _likeliest(scores: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """The scores and tokens [S, C] of the `count` likeliest and of all that tie with the last of them, by rising token."""
    if count is None or count >= scores.shape[-1]:
        return scores, torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    least = scores.topk(count, dim=-1).values[:, -1:]
    kept = int((scores >= least).sum(-1).max())
    tokens = scores.topk(kept, dim=-1).indices.sort(-1).values
    scores = scores.gather(-1, tokens)
    return scores.masked_fill(scores < least, -math.inf), tokens
