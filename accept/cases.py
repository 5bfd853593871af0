"""Inputs for every op: small ones to compare with the reference, those of Qwen3.5-4B to time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ToDevice = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...]  # of the sequences
    heads: tuple[int, int, int]  # attention: Hq, Hkv, D
    delta: tuple[int, int, int]  # delta net: Hk, Hv, Dk = Dv
    hidden: int
    inner: int  # intermediate size of the MLP
    experts: tuple[int, int, int]  # E, K, intermediate size of an expert
    vocabulary: int


# Lengths around the edges of a chunk of 64; head sizes as the NPU kernels require.
SMALL = Sizes((1, 63, 64, 65, 7), (4, 2, 256), (2, 4, 128), 256, 192, (8, 2, 64), 999)


def sizes_of_4b(tokens: int, vocabulary: int) -> Sizes:
    """Sizes of Qwen3.5-4B; 64 of the 256 experts of 35B-A3B."""
    return Sizes((tokens // 4,) * 4, (16, 4, 256), (16, 32, 128), 2560, 9216, (64, 8, 512), vocabulary)


@dataclass(frozen=True)
class Case:
    inputs: list[Tensor]  # fp32, differentiable
    call: Callable[[Callable, Sequence[Tensor], ToDevice], Any]
    wide: tuple[int, ...] = ()  # indices of inputs that stay fp32 in a bf16 model


def make_cases(s: Sizes) -> dict[str, Callable[[], Case]]:
    """op -> a function that makes its case."""
    T, cu = sum(s.lengths), torch.tensor([0, *s.lengths]).cumsum(0).to(torch.int32)
    (Hq, Hkv, D), (Hk, Hv, Dk), (E, K, inner) = s.heads, s.delta, s.experts

    def experts() -> Case:
        ids = torch.rand(T, E - 1).topk(K).indices  # the last expert gets no tokens
        weights = [torch.randn(E, 2 * inner, s.hidden) * s.hidden**-0.5, torch.randn(E, s.hidden, inner) * inner**-0.5]
        inputs = [torch.randn(T, s.hidden), torch.rand(T, K), *weights]
        return Case(inputs, lambda op, x, to: op(x[0], to(ids), *x[1:]), wide=(1,))

    def rotary() -> Case:
        angle = torch.randn(T, D // 8)
        cos, sin = angle.cos(), angle.sin()
        return Case([torch.randn(T, H, D) for H in (Hq, Hkv)], lambda op, x, to: op(*x, to(cos), to(sin)))

    def cross_entropy() -> Case:
        labels = torch.randint(0, s.vocabulary, (T,))
        labels[::3] = -100
        inputs = [torch.randn(T, s.hidden), torch.randn(s.vocabulary, s.hidden) * s.hidden**-0.5]
        weights = torch.full((T,), 1 / T)
        return Case(inputs, lambda op, x, to: op(*x, to(labels), to(weights))[0])

    def delta_rule() -> Case:
        q, k, v = torch.randn(T, Hk, Dk), torch.randn(T, Hk, Dk), torch.randn(T, Hv, Dk)
        return Case([q, k, v, -torch.rand(T, Hv), torch.rand(T, Hv)], lambda op, x, to: op(*x, cu), wide=(3, 4))

    def attention() -> Case:
        inputs = [torch.randn(T, H, D) for H in (Hq, Hkv, Hkv)]
        return Case(inputs, lambda op, x, to: op(*x, cu, True, D**-0.5))

    def convolution() -> Case:
        channels = (2 * Hk + Hv) * Dk
        return Case([torch.randn(T, channels), torch.randn(channels, 4)], lambda op, x, to: op(*x, cu))

    def norm() -> Case:
        return Case([torch.randn(T, s.hidden), torch.randn(s.hidden)], lambda op, x, to: op(*x, 1e-6))

    def gated_norm() -> Case:
        inputs = [torch.randn(T * Hv, Dk), torch.randn(T * Hv, Dk), torch.randn(Dk)]
        return Case(inputs, lambda op, x, to: op(*x, 1e-6), wide=(2,))

    return {
        "chunk_gated_delta_rule": delta_rule,
        "causal_conv1d": convolution,
        "moe_experts": experts,
        "varlen_attention": attention,
        "rms_norm": norm,
        "rms_norm_gated": gated_norm,
        "apply_rotary": rotary,
        "swiglu": lambda: Case([torch.randn(T, 2 * s.inner)], lambda op, x, to: op(*x)),
        "linear_cross_entropy": cross_entropy,
    }
