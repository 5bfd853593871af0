"""Arguments for every op: small ones to compare with the reference, those of Qwen3.5-4B to time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# A letter for each argument, and the arguments: n and w are differentiable, in a bf16 model n is
# bf16 and w fp32; d lies on the device, h on the host.
Case = tuple[str, Sequence[Any]]

# Lengths around the edges of a chunk of 64; head sizes as the NPU kernels require.
SMALL = ((1, 63, 64, 65, 7), (4, 2, 256), (2, 4, 128), 256, 192, (8, 2, 64), 999)


def sizes_of_4b(tokens: int, vocabulary: int) -> tuple:
    """Sizes of Qwen3.5-4B, as in SMALL; 64 of the 256 experts of 35B-A3B."""
    return (tokens // 4,) * 4, (16, 4, 256), (16, 32, 128), 2560, 9216, (64, 8, 512), vocabulary


def make_cases(
    lengths: Sequence[int],  # of the sequences
    attention: tuple[int, int, int],  # Hq, Hkv, D
    delta: tuple[int, int, int],  # of the delta net: Hk, Hv, Dk = Dv
    hidden: int,
    inner: int,  # intermediate size of the MLP
    experts: tuple[int, int, int],  # E, K, intermediate size of an expert
    vocabulary: int,
) -> dict[str, Callable[[], Case]]:
    """op -> a function that makes its case."""
    T, cu = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    (Hq, Hkv, D), (Hk, Hv, Dk), (E, K, wide), randn = attention, delta, experts, torch.randn

    def routed() -> Case:
        ids = torch.rand(T, E - 1).topk(K).indices  # the last expert gets no tokens
        weights = randn(E, 2 * wide, hidden) * hidden**-0.5, randn(E, hidden, wide) * wide**-0.5
        return "ndwnn", (randn(T, hidden), ids, torch.rand(T, K), *weights)

    def rotary() -> Case:
        angle = randn(T, D // 8)
        return "nndd", (randn(T, Hq, D), randn(T, Hkv, D), angle.cos(), angle.sin())

    def labelled() -> Case:
        labels = torch.randint(0, vocabulary, (T,))
        labels[::3] = -100
        return "nnd", (randn(T, hidden), randn(vocabulary, hidden) * hidden**-0.5, labels)

    def cross_entropy() -> Case:
        kinds, values = labelled()
        return f"{kinds}d", (*values, torch.full((T,), 1 / T))

    def delta_rule() -> Case:
        qkv = [randn(T, heads, Dk) for heads in (Hk, Hk, Hv)]
        return "nnnwwh", (*qkv, -torch.rand(T, Hv), torch.rand(T, Hv), cu)

    channels, rows, kv = (2 * Hk + Hv) * Dk, (T * Hv, Dk), (T, Hkv, D)
    return {
        "chunk_gated_delta_rule": delta_rule,
        "causal_conv1d": lambda: ("nnh", (randn(T, channels), randn(channels, 4), cu)),
        "moe_experts": routed,
        "varlen_attention": lambda: ("nnnhhh", (randn(T, Hq, D), randn(kv), randn(kv), cu, True, D**-0.5)),
        "rms_norm": lambda: ("nnh", (randn(T, hidden), randn(hidden), 1e-6)),
        "rms_norm_gated": lambda: ("nnwh", (randn(rows), randn(rows), randn(Dk), 1e-6)),
        "apply_rotary": rotary,
        "swiglu": lambda: ("n", (randn(T, 2 * inner),)),
        "linear_cross_entropy": cross_entropy,
        "token_log_probs": labelled,
    }


def prepare(
    case: Case, dtype: torch.dtype, device: torch.device, exact: torch.dtype | None = None
) -> tuple[list[Any], list[Tensor]]:
    """-> arguments, and of these the differentiable ones, rounded to dtype and then made exact."""
    args: list[Any] = []
    for kind, value in zip(*case, strict=True):
        if kind in "nw":
            value = value.to(dtype if kind == "n" else torch.float32)
            value = value.to(device, exact or value.dtype).detach().requires_grad_()
        args.append(value.to(device) if kind == "d" else value)
    return args, [x for x, kind in zip(args, case[0], strict=True) if kind in "nw"]


def outputs_of(op: Callable, args: Sequence[Any]) -> list[Tensor]:
    """The differentiable ones."""
    out = op(*args)
    return [y for y in ((out,) if isinstance(out, Tensor) else out) if y.requires_grad]
