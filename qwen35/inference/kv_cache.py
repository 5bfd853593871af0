"""What a model remembers while it generates: cores that take the place of those between the projections.

The first call of each runs the packed prompts as ever, and keeps what the following ones need: of every further call, the rows
are one token more of each sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernels.attention import Prepare
from kernels.decode import attention_step, causal_conv1d_step, gated_delta_rule_step, last_inputs
from kernels.gated_delta_rule import chunk_gated_delta_rule_and_state
from kernels.host import to_device
from kernels.recompute_cache import RecomputeCache
from qwen35.model.attention import Attention, AttentionCore
from qwen35.model.gated_delta_net import DeltaNetCore, GatedDeltaNet
from qwen35.model.qwen35 import Qwen35

BLOCK = 256  # tokens by which the part of the store that a step looks at grows: shapes stay few


class CachedAttention(nn.Module):
    """Keeps the keys and values [S, L, Hkv, D], L the longest prompt and `room` tokens more."""

    def __init__(self, core: AttentionCore, room: int):
        super().__init__()
        self.core, self.room = core, room
        self.keys: Tensor | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        prepare: Prepare,
        *inputs: Tensor,
        recompute_cache: RecomputeCache | None = None,
    ) -> Tensor:
        """The prompts: q [T, Hq, D], k, v [T, Hkv, D] -> [T, Hq, D]. Then [S, …] -> [S, Hq, D]. Nothing runs twice here."""
        q, k = prepare(q, k, *inputs)
        if self.keys is None:
            self._fill(k, v, cu_seqlens)
            return self.core(q, k, v, cu_seqlens)
        self.keys[self.row, self.lengths] = k
        self.values[self.row, self.lengths] = v
        self.lengths += 1
        self.longest += 1
        seen = -(-self.longest // BLOCK) * BLOCK  # a slice ends at the store's own end
        return attention_step(q, self.keys[:, :seen], self.values[:, :seen], self.lengths, q.shape[-1] ** -0.5)

    def _fill(self, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
        lengths = cu_seqlens.diff().long()
        row = torch.arange(len(lengths)).repeat_interleave(lengths)
        place = torch.arange(len(row)) - cu_seqlens[:-1].long()[row]
        row, place = (to_device(x, k.device) for x in (row, place))
        self.longest = int(lengths.max())
        # zeros, for what is masked still meets a weight of zero
        self.keys = k.new_zeros(len(lengths), self.longest + self.room, *k.shape[1:])
        self.values = torch.zeros_like(self.keys)
        self.keys[row, place] = k
        self.values[row, place] = v
        self.lengths = lengths.to(k.device)
        self.row = torch.arange(len(lengths), device=k.device)


class CachedDeltaNet(nn.Module):
    """Keeps the last inputs of the convolution [S, C, K-1], and the state of the delta rule [S, Hv, Dk, Dv] fp32."""

    def __init__(self, core: DeltaNetCore):
        super().__init__()
        self.core = core
        self.state: Tensor | None = None

    def forward(
        self,
        qkv: Tensor,
        g: Tensor,
        beta: Tensor,
        conv_weight: Tensor,
        cu_seqlens: Tensor,
        recompute_cache: RecomputeCache | None = None,
    ) -> Tensor:
        """The prompts: qkv [T, C], g, beta [T, Hv] fp32, conv_weight [C, K] -> [T, Hv, Dv]. Then [S, …] -> [S, Hv, Dv]."""
        heads = self.core.heads
        if self.state is None:
            self.tail = last_inputs(qkv, cu_seqlens, conv_weight.shape[1] - 1)
            q, k, v = heads(self.core.conv(qkv, conv_weight, cu_seqlens))
            out, self.state = chunk_gated_delta_rule_and_state(q, k, v, g, beta, cu_seqlens)
            return out
        return gated_delta_rule_step(*heads(causal_conv1d_step(qkv, conv_weight, self.tail)), g, beta, self.state)


@contextmanager
def caching(model: Qwen35, room: int) -> Iterator[None]:
    """Inside, the model's first run is over packed prompts, and each of up to `room` others over one token more of each.

    Raises RuntimeError if other cores are in already: one generation at a time.
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
    raise RuntimeError(f"a {type(core).__name__} is where a plain core belongs: is the model generating already?")
