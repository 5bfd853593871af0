"""The gated delta net's two operators from fla-core, whose triton_ascend backend runs on NPUs.

The lengths are passed on the device and on the host, so that fla need not sync. fla's kernels need
their own triton and a device: the tests check the arguments passed to them, not their results.
"""

import torch
from fla.modules.causal_conv1d import causal_conv1d as fla_causal_conv1d
from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fla_chunk_gated_delta_rule
from torch import Tensor

from kernels.host import computed_once, to_device


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, recompute_cache: object = None
) -> Tensor:
    """Raises ValueError with a recompute cache: fla's backward needs its whole forward."""
    if recompute_cache is not None:
        raise ValueError(
            "parallel.recompute: selective does not work with model.kernels.chunk_gated_delta_rule=fla, whose output"
            " cannot be reused in the second run of a layer; set parallel.recompute to true"
        )
    if not len(q):
        return torch.zeros_like(v)
    packed = (x[None] for x in (q, k, v, g, beta))  # [1, T, …]
    return fla_chunk_gated_delta_rule(*packed, use_qk_l2norm_in_kernel=True, **_lengths(cu_seqlens, q))[0][0]


def causal_conv1d(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    if not len(x):
        return torch.zeros_like(x)
    return fla_causal_conv1d(x[None], weight, activation="silu", **_lengths(cu_seqlens, x))[0][0]


def _lengths(cu_seqlens: Tensor, x: Tensor) -> dict[str, Tensor]:
    def make() -> dict[str, Tensor]:
        host = cu_seqlens.long().unique_consecutive()  # without empty sequences
        return {"cu_seqlens": to_device(host, x.device), "cu_seqlens_cpu": host}

    return computed_once(cu_seqlens, ("fla", x.device), make)
