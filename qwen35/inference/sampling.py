"""The next token: the likeliest, or sampled with temperature, top_k, top_p, min_p and penalties."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.host import to_device
from qwen35.config.load import SettingError


@dataclass(frozen=True)
class Sampling:
    """Applied as in transformers: penalties, temperature, top_k, top_p, min_p, each to the rest."""

    temperature: float = 0.0  # of the softmax; 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens and ties with the last of them; None: all
    top_p: float = 1.0  # only the fewest, likeliest tokens that together have this probability
    min_p: float = 0.0  # only tokens with at least this share of the likeliest token's probability
    repetition_penalty: float = 1.0  # divides positive logits of all tokens so far, multiplies negative ones
    presence_penalty: float = 0.0  # is subtracted from the logits of the answer's tokens so far
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises SettingError."""
        for name, is_right, bound in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0, and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("seed", 0 <= self.seed < 2**63, "at least 0, and below 2^63"),
        ):
            if not is_right:
                raise SettingError(f"{name} {getattr(self, name)} must be {bound}")

    def __str__(self) -> str:
        """Everything that differs from greedy decoding without penalties."""
        plain = Sampling(self.temperature, seed=self.seed)
        changed = [f"{name} {value:g}" for name, value in vars(self).items() if value != getattr(plain, name)]
        if self.is_greedy:
            return ", ".join(["greedy", *changed])
        return ", ".join([f"temperature {self.temperature:g}", *changed, f"seed {self.seed}"])

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def generators(self, count: int) -> list[torch.Generator]:
        """One per sequence, with one seed: a prompt's answer does not depend on the others."""
        return [torch.Generator().manual_seed(self.seed) for _ in range(count)]


class Penalties:
    """Changes the logits of tokens that have occurred before.

    repetition_penalty, as in transformers' RepetitionPenaltyLogitsProcessor and vLLM, counts the
    prompt's tokens too. presence_penalty, as in the OpenAI API and vLLM's apply_penalties, comes
    after it and counts the answer's tokens alone, each once; transformers lacks it.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Tensor], vocab_size: int, device: torch.device):
        """prompts: token ids of each prompt, on the host."""
        self.repetition, self.presence = sampling.repetition_penalty, sampling.presence_penalty
        self.are_none = self.repetition == 1 and self.presence == 0
        if self.are_none:
            return
        in_prompt = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
        for row, ids in zip(in_prompt, prompts, strict=True):
            row[ids] = True
        self.in_prompt = to_device(in_prompt, device)  # [S, V]
        self.in_answer = torch.zeros_like(self.in_prompt)
        self.ids = torch.arange(vocab_size, device=device)

    def apply(self, logits: Tensor) -> Tensor:
        """logits [S, V] -> penalized logits [S, V] fp32."""
        if self.are_none:
            return logits
        logits = logits.float()
        if self.repetition != 1:
            lowered = torch.where(logits < 0, logits * self.repetition, logits / self.repetition)
            logits = torch.where(self.in_prompt | self.in_answer, lowered, logits)
        return logits - self.presence * self.in_answer

    def add(self, tokens: Tensor) -> None:
        """Note the tokens [S] that were chosen."""
        if not self.are_none:
            self.in_answer |= tokens[:, None] == self.ids


def draw(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """logits [S, V] -> next tokens [S] int64. The host draws: the same numbers on every device."""
    if sampling.is_greedy:
        return logits.argmax(-1)
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    return pick(logits, sampling, uniform.to(logits.device))


def pick(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: logits [S, V], uniform [S] in [0, 1) -> tokens [S] int64.

    The cumulative distribution runs from the likeliest token to the least likely.
    """
    probabilities, tokens = distribution(logits, sampling)
    ends = probabilities.cumsum(-1)
    chosen = (ends <= uniform[:, None] * ends[:, -1:]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(-1, torch.minimum(chosen, last)).squeeze(-1)


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits [S, V] -> probabilities [S, C] in falling order, their tokens [S, C]; others: zero."""
    logits = logits.float()
    scores, tokens = _likeliest((logits - logits.amax(-1, keepdim=True)) / sampling.temperature, sampling.top_k)
    scores, order = scores.sort(dim=-1, stable=True)  # rising, as in transformers, which ends ties alike
    if sampling.top_p < 1:
        removed = scores.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        removed[:, -1] = False
        scores = scores.masked_fill(removed, -math.inf)
    if sampling.min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < sampling.min_p * probabilities[:, -1:], -math.inf)
    return scores.softmax(-1).flip(-1), tokens.gather(-1, order).flip(-1)


def _likeliest(scores: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """-> scores, tokens [S, C], by rising token: the `count` likeliest and ties with the last."""
    if count is None or count >= scores.shape[-1]:
        return scores, torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    least = scores.topk(count, dim=-1).values[:, -1:]
    columns = int((scores >= least).sum(-1).max())
    tokens = scores.topk(columns, dim=-1).indices.sort(-1).values
    scores = scores.gather(-1, tokens)
    return scores.masked_fill(scores < least, -math.inf), tokens
