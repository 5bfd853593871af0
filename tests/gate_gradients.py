"""The gradients of the delta net's gates, A_log and dt_bias, of one layer, beside transformers'.

The layer has a group of heads for each setting of the gates. Weights and tokens are of one dtype,
A_log and dt_bias fp32, as in training. The truth is the recurrence of kernels/reference.py in fp64.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Kernels, reference
from qwen35.model.gated_delta_net import GatedDeltaNet
from qwen35.model.linear import recomputed_linears

HIDDEN, SIZE = 64, 32  # of the tokens; Dk = Dv
HEADS = 16  # of each setting
# setting -> ranges of exp(A_log) and of dt_bias; g is about -exp(A_log) softplus(dt_bias)
SETTINGS = {
    "of a new model": ((0.01, 16), (1, 1)),
    "trained": ((0.01, 7), (-6, 2)),
    "open": ((1, 1), (-10, -8)),
    "small A": ((3e-4, 1e-3), (0, 0)),
    "half open": ((1, 4), (0, 0.5)),
    "closed": ((12, 16), (1, 1)),
    "shut": ((16, 20), (3, 4)),
}
ALIKE = 0.05  # how far tokens that are alike are from each other: then most of each gradient cancels
# (dtype, whether tokens are alike). Not both bf16 and alike, where most of what each token writes
# cancels too: with matmuls of bf16 numbers, which transformers does not use, errors are then up to
# 7 times as large
CASES = {
    "fp32": (torch.float32, False),
    "fp32, tokens alike": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
}


def gradients(
    kernels: Kernels, dtype: torch.dtype, lengths: list[int], heads: int, alike: bool, seed: int
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """setting -> gradients by `kernels`, by transformers, and the truth, [2, heads] each.

    Sequences of `lengths` are packed; transformers gets one at a time.
    """
    from transformers.models.qwen3_5 import Qwen3_5TextConfig  # slow to import
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    generator = torch.Generator().manual_seed(seed)
    value_heads, names = heads * len(SETTINGS), [f"linear_{kind}_head_dim" for kind in ("key", "value")]
    sizes = dict.fromkeys(names, SIZE) | {
        "linear_num_key_heads": value_heads // 2,
        "linear_num_value_heads": value_heads,
    }
    config = Qwen3_5TextConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, layer_types=["linear_attention"], linear_conv_kernel_dim=4, **sizes
    )
    ours, theirs = GatedDeltaNet(config, kernels), Qwen3_5GatedDeltaNet(config, 0)
    weights = {name: torch.randn(p.shape, generator=generator) for name, p in ours.named_parameters()}
    for name, x in weights.items():
        weights[name] = (x * (0.5 if "conv" in name else x.shape[-1] ** -0.5)).to(dtype)
    weights["norm.weight"] = torch.ones(SIZE)
    between = [[torch.empty(heads).uniform_(*ends, generator=generator) for ends in both] for both in SETTINGS.values()]
    decay, weights["dt_bias"] = (torch.cat(parts) for parts in zip(*between, strict=True))
    weights["A_log"] = decay.log()
    x, probe = (torch.randn(sum(lengths), HIDDEN, generator=generator) for _ in range(2))
    x, probe = (1 + ALIKE * x if alike else x).to(dtype), probe.to(dtype)
    for layer in (ours, theirs):
        layer.load_state_dict(weights, assign=True)
        layer.requires_grad_(True)
    norm = SimpleNamespace(project=lambda x, *projections: recomputed_linears(None, projections, x))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    ours(x, norm, cu_seqlens).backward(probe)
    torch.cat([theirs(sequence[None])[0] for sequence in x.split(lengths)]).backward(probe)
    truth = _exact({name: w.double() for name, w in weights.items()}, x.double(), probe.double(), cu_seqlens)
    found = [torch.stack([layer.A_log.grad, layer.dt_bias.grad]).double() for layer in (ours, theirs)]
    groups = zip(*(y.split(heads, dim=1) for y in (*found, truth)), strict=True)
    return dict(zip(SETTINGS, groups, strict=True))


def _exact(weights: dict[str, Tensor], x: Tensor, probe: Tensor, cu_seqlens: Tensor) -> Tensor:
    """-> the gradients of A_log and dt_bias [2, Hv]"""
    A_log, dt_bias = (weights[name].requires_grad_() for name in ("A_log", "dt_bias"))
    qkv, z, b, a = (x @ weights[f"in_proj_{name}.weight"].T for name in ("qkv", "z", "b", "a"))
    heads = reference.causal_conv1d(qkv, weights["conv1d.weight"][:, 0], cu_seqlens).unflatten(1, (-1, SIZE))
    q, k, v = heads.split([len(A_log) // 2, len(A_log) // 2, len(A_log)], dim=1)
    g = -A_log.exp() * F.softplus(a + dt_bias)
    out = reference.chunk_gated_delta_rule(q, k, v, g, b.sigmoid(), cu_seqlens)
    out = reference.rms_norm_gated(out, z.view_as(out), weights["norm.weight"], 1e-6)
    (out.flatten(1) @ weights["out_proj.weight"].T * probe).sum().backward()
    return torch.stack([A_log.grad, dt_bias.grad])


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative errors: of all heads by their norm, and of the median head."""
    off = (found - exact).abs()
    return float(off.norm() / exact.norm()), float((off / exact.abs()).median())


def compare_with_transformers(kernels: Kernels, case: str, lengths: list[int], seeds: int) -> None:
    """Over the heads of several draws: of one head, transformers' error may be zero by luck."""
    dtype, alike = CASES[case]
    draws = [gradients(kernels, dtype, lengths, HEADS, alike, seed) for seed in range(seeds)]
    for setting in SETTINGS:
        ours, theirs, exact = (
            torch.cat(parts, dim=1) for parts in zip(*(draw[setting] for draw in draws), strict=True)
        )
        for name, x, y, z in zip(("A_log", "dt_bias"), ours, theirs, exact, strict=True):
            for mine, other in zip(errors(x, z), errors(y, z), strict=True):
                assert mine <= 2 * other, f"{setting}, {name}: {mine:.1e}, transformers {other:.1e}"
        if dtype == torch.float32:  # however small the gradient, since nothing cancels in its sum
            assert errors(ours, exact)[0] <= 1e-3, f"{setting}: {errors(ours, exact)[0]:.1e}"
