"""The KV cache and the delta net's state, in modules that replace the cores of a model's mixers.

The first call runs the packed prompts and fills the cache. Each later call runs one more token of
every sequence, in one row per sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention import Prepare
from kernels.decode import attention_step, causal_conv1d_step, gated_delta_rule_step, last_inputs
from kernels.gated_delta_rule import chunk_gated_delta_rule_and_state
from kernels.host import to_device
from qwen35.model.attention import Attention, AttentionCore
from qwen35.model.gated_delta_net import DeltaNetCore, GatedDeltaNet
from qwen35.model.qwen35 import Qwen35

BLOCK = 256  # attention sees a multiple of this many cached tokens, so that few shapes occur


class CachedAttention(nn.Module):
    """Caches keys and values [S, L, Hkv, D], L = the longest prompt + `room` tokens."""

    def __init__(self, core: AttentionCore, room: int):
        super().__init__()
        self.core, self.room = core, room
        self.keys: Tensor | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prepare: Prepare, *inputs: Tensor, **_: Any
    ) -> Tensor:
        """First q [T, Hq, D], k, v [T, Hkv, D] -> [T, Hq, D]; in later calls T = S."""
        q, k = prepare(q, k, *inputs)
        if self.keys is None:
            self._fill(k, v, cu_seqlens)
            return self.core(q, k, v, cu_seqlens)
        self.keys[self.row, self.lengths] = k
        self.values[self.row, self.lengths] = v
        self.lengths += 1
        self.longest += 1
        seen = -(-self.longest // BLOCK) * BLOCK  # may exceed the cache: slices stop at its end
        return attention_step(q, self.keys[:, :seen], self.values[:, :seen], self.lengths, q.shape[-1] ** -0.5)

    def _fill(self, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
        lengths = cu_seqlens.diff().long()
        row = torch.arange(len(lengths)).repeat_interleave(lengths)
        column = torch.arange(len(row)) - cu_seqlens[:-1].long()[row]
        row, column = (to_device(x, k.device) for x in (row, column))
        self.longest = int(lengths.max())
        # Zeros, since masked values are multiplied by a weight of zero: NaN would spread.
        self.keys = k.new_zeros(len(lengths), self.longest + self.room, *k.shape[1:])
        self.values = torch.zeros_like(self.keys)
        self.keys[row, column] = k
        self.values[row, column] = v
        self.lengths = lengths.to(k.device)
        self.row = torch.arange(len(lengths), device=k.device)


class CachedDeltaNet(nn.Module):
    """Caches the convolution's inputs [S, C, K-1], the delta rule's state [S, Hv, Dk, Dv] fp32."""

    def __init__(self, core: DeltaNetCore):
        super().__init__()
        self.core = core
        self.state: Tensor | None = None

    def forward(self, qkv: Tensor, g: Tensor, beta: Tensor, conv_weight: Tensor, cu_seqlens: Tensor, *_: Any) -> Tensor:
        """qkv [T, C], g, beta [T, Hv] fp32, conv_weight [C, K] -> [T, Hv, Dv]; then T = S."""
        heads = self.core.heads
        if self.state is None:
            self.tail = last_inputs(qkv, cu_seqlens, conv_weight.shape[1] - 1)
            q, k, v = heads(self.core.conv(qkv, conv_weight, cu_seqlens))
            out, self.state = chunk_gated_delta_rule_and_state(q, k, v, g, beta, cu_seqlens)
            return out
        return gated_delta_rule_step(*heads(causal_conv1d_step(qkv, conv_weight, self.tail)), g, beta, self.state)


@contextmanager
def caching(model: Qwen35, room: int) -> Iterator[None]:
    """Inside, the model's first call runs packed prompts; up to `room` more run a token of each.

    Raises RuntimeError if the model is generating already.
    """
    mixers = [m for m in model.model.language_model.modules() if isinstance(m, Attention | GatedDeltaNet)]
    cores = [mixer.get_submodule("core") for mixer in mixers]
    try:
        for mixer, core in zip(mixers, cores, strict=True):
            mixer.register_module("core", _cached(core, room))
        yield
    finally:
        for mixer, core in zip(mixers, cores, strict=True):
            mixer.register_module("core", core)


def _cached(core: nn.Module, room: int) -> nn.Module:
    if isinstance(core, AttentionCore):
        return CachedAttention(core, room)
    if isinstance(core, DeltaNetCore):
        return CachedDeltaNet(core)
    raise RuntimeError(f"the model has a {type(core).__name__} as a core: is it generating already?")
