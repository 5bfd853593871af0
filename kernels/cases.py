"""Inputs for every op: small ones that reference.py can be asked about, and those of Qwen3.5-4B, to be timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

To = Callable[[Tensor], Tensor]  # onto the device on which an op runs


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...]  # of the sequences
    heads: tuple[int, int, int]  # of queries, of keys and values, and their width
    delta: tuple[int, int, int]  # of keys, of values, and their width
    hidden: int
    inner: int  # of the MLP
    experts: tuple[int, int, int]  # how many, of them a token's, and their inner width
    vocabulary: int


# Lengths about the edges of a chunk of 64; widths of heads as the kernels on NPUs are made for.
FEW = Sizes((1, 63, 64, 65, 7), (4, 2, 256), (2, 4, 128), 256, 192, (8, 2, 64), 999)


def of_4b(tokens: int, vocabulary: int) -> Sizes:
    """Experts as in 35B-A3B, 64 of the 256."""
    return Sizes((tokens // 4,) * 4, (16, 4, 256), (16, 32, 128), 2560, 9216, (64, 8, 512), vocabulary)


@dataclass(frozen=True)
class Case:
    inputs: list[Tensor]  # fp32, whose gradients are wanted
    call: Callable[[Callable, Sequence[Tensor], To], Any]
    wide: tuple[int, ...] = ()  # inputs that are fp32 in a bf16 model too


def make_cases(s: Sizes) -> dict[str, Callable[[], Case]]:
    """op -> its case, made when it is asked for."""
    T, cu = sum(s.lengths), torch.tensor([0, *s.lengths]).cumsum(0).to(torch.int32)
    (Hq, Hkv, D), (Hk, Hv, Dk), (E, K, inner) = s.heads, s.delta, s.experts

    def experts() -> Case:
        ids = torch.rand(T, E - 1).topk(K).indices  # the last one idles
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
        each = torch.full((T,), 1 / T)
        return Case(inputs, lambda op, x, to: op(*x, to(labels), to(each))[0])

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
