"""The gated delta rule over packed sequences, in chunks.

For each head, with state S [Dk, Dv] starting at zero in every sequence, l2-normed q, k and q scaled
by Dk^-1/2:

    S <- exp(g_t) S;   S <- S + k_t beta_t (v_t - k_t^T S)^T;   o_t = S^T q_t

In a chunk of C tokens, let S be the state before it, b the running sum of g, E = V - exp(b) K S the
state's prediction error and A[i, j] = beta_i exp(b_i - b_j) k_i k_j for j < i. The C updates are
one unit-triangular system (the UT transform):

    V' = (I + A)^-1 (beta E);   O = exp(b) Q S + (Q K^T * exp(b_i - b_j)) V';
    S <- exp(b_C) S + (exp(b_C - b) K)^T V'

The work goes chunk by chunk over all heads of a few sequences at a time, so that the data of a step
stays in the processor's cache. Saved for backward: the inputs, and for each chunk the state that
enters it and the inverse above. No K head is copied for each of the V heads that share it.
Source: Yang, Kautz, Hatamizadeh 2024, Gated Delta Networks, arXiv:2412.06464; the gradients are
derived from the equations above.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.host import computed_once, to_device
from kernels.native import working_dtype
from kernels.recompute_cache import RecomputeCache, outputs_once

Inputs = tuple[Tensor, ...]  # q, k, v, g, beta

CHUNK_SIZE = 64
HEADS_AT_ONCE = 64  # sequences times V heads that one step processes


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    recompute_cache: RecomputeCache | None = None,
) -> Tensor:
    """q, k [T, Hk, Dk], not normed; v [T, Hv, Dv]; g, beta [T, Hv]; cu_seqlens [S+1] on the CPU.

    g <= 0 is the log of the decay. Returns o [T, Hv, Dv] in v's dtype; sums are fp32. K head h
    serves the Hv/Hk consecutive V heads from h*Hv/Hk. With a recompute cache the layer's second run
    takes o from the first and computes only the states.
    """
    return _GatedDeltaRule.apply((cu_seqlens, torch.is_grad_enabled(), recompute_cache), q, k, v, g, beta)


@torch.no_grad()
def chunk_gated_delta_rule_and_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """As above, for generation, with the state after each sequence [S, Hv, Dk, Dv] fp32."""
    state = torch.zeros(
        len(cu_seqlens) - 1, v.shape[1], k.shape[2], v.shape[2], dtype=working_dtype(v), device=v.device
    )
    out = torch.empty_like(v)
    _forward((q, k, v, g, beta), cu_seqlens, out, None, state)
    return out, state


@dataclass(frozen=True)
class ChunkStep:
    """Chunk i of the n sequences of a group that are long enough to have one."""

    tokens: Tensor  # [n * C] token indices of the n chunks; a short chunk repeats its last token
    is_real: Tensor | None = None  # [n, C] bool, False for those repetitions; None: there are none
    real_rows: Tensor | None = None  # indices into `tokens` of the real ones

    @property
    def count(self) -> int:
        return len(self.tokens) // CHUNK_SIZE

    @staticmethod
    def of(tokens: Tensor, is_real: Tensor, device: torch.device) -> "ChunkStep":
        tokens, real_rows = to_device(tokens.flatten(), device), is_real.flatten().nonzero().squeeze(1)
        if len(real_rows) == len(tokens):
            return ChunkStep(tokens)
        return ChunkStep(tokens, to_device(is_real, device), to_device(real_rows, device))


Group = tuple[Tensor, list[ChunkStep]]  # sequences that are processed together, and their steps


def sequence_groups(cu_seqlens: Tensor, size: int, device: torch.device) -> list[Group]:
    """cu_seqlens [S+1] on the CPU -> groups of up to `size` sequences, longest first."""
    return computed_once(cu_seqlens, ("groups", size, device), lambda: list(_sequence_groups(cu_seqlens, size, device)))


def _sequence_groups(cu_seqlens: Tensor, size: int, device: torch.device) -> Iterator[Group]:
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    order = lengths.argsort(descending=True, stable=True)
    position = torch.arange(CHUNK_SIZE)
    for members in order[: int((lengths > 0).sum())].split(size):
        if not len(members):
            return
        start, length = starts[members, None], lengths[members, None]
        steps = []
        for first in range(0, int(length[0]), CHUNK_SIZE):
            active = int((length > first).sum())
            offset = first + position  # [C]
            tokens = start[:active] + torch.minimum(offset, length[:active] - 1)
            steps.append(ChunkStep.of(tokens, offset < length[:active], device))
        yield members, steps


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: tuple, *inputs: Tensor) -> Tensor:
        cu_seqlens, grad_enabled, recompute_cache = options
        chunks: list[tuple[Tensor, Tensor]] | None = [] if grad_enabled else None

        def compute() -> tuple[Tensor]:
            out = torch.empty_like(inputs[2])
            _forward(inputs, cu_seqlens, out, chunks)
            return (out,)

        (out,) = outputs_once(recompute_cache, compute)
        if chunks is not None:
            if not chunks:
                _forward(inputs, cu_seqlens, None, chunks)
            ctx.save_for_backward(*inputs, *chain.from_iterable(chunks))
        ctx.cu_seqlens = cu_seqlens
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputation lets each be unpacked only once
        inputs, states = saved[:5], saved[5:]
        pairs = list(zip(states[::2], states[1::2], strict=True))
        return None, *_backward(inputs, ctx.cu_seqlens, pairs, grad_out)


class _Chunk:
    """The tensors of one step: n chunks over all heads, B = n * Hv. Matrices are computed lazily.

    Operands of matmuls have v's dtype (`dot`); sums are fp32 (`wide`), or fp64 for fp64 inputs.
    """

    def __init__(self, inputs: Inputs, step: ChunkStep, inverse: Tensor | None = None):
        q, k, v, g, beta = inputs
        self.step, self.saved_inverse = step, inverse
        self.n, self.v_per_k = step.count, v.shape[1] // k.shape[1]
        self.wide, self.dot = working_dtype(v), v.dtype
        self.scale = k.shape[2] ** -0.5
        # zero gates make padding rows inert: they neither decay the state nor write to it
        g, self.beta = (self.gather(x[..., None], zero=True) for x in (g, beta))  # [B, C, 1]
        raw_q, raw_k, self.v = (self.gather(x) for x in (q, k, v))  # [n * Hk, C, Dk] twice, [B, C, Dv]
        self.q_norm, self.k_norm = (torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (raw_q, raw_k))
        self.q, self.k = raw_q * (self.q_norm * self.scale), raw_k * self.k_norm
        self.cum = g.cumsum(1)  # [B, C, 1] b
        self.from_start = _decay(self.cum)  # exp(b)
        self.to_end = _decay(self.cum[:, -1:] - self.cum)  # exp(b_C - b)
        self.chunk_decay = self.from_start[:, -1:]  # [B, 1, 1] exp(b_C)

    def gather(self, x: Tensor, zero: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """[T, H, D] -> [n * H, C, D]"""
        rows = x.index_select(0, self.step.tokens).view(self.n, CHUNK_SIZE, *x.shape[1:])
        if zero and self.step.is_real is not None:
            rows = rows * self.step.is_real[..., None, None]
        out = torch.empty(self.n, x.shape[1], CHUNK_SIZE, x.shape[2], dtype=dtype or self.wide, device=x.device)
        return out.copy_(rows.transpose(1, 2)).flatten(0, 1)

    def scatter(self, x: Tensor, out: Tensor) -> None:
        """The inverse of gather: writes x [n * H, C, D] into the rows of out [T, H, D]"""
        rows = x.unflatten(0, (self.n, -1)).transpose(1, 2).flatten(0, 1)  # [n * C, H, D]
        tokens, real_rows = self.step.tokens, self.step.real_rows
        if real_rows is not None:
            rows, tokens = rows.index_select(0, real_rows), tokens.index_select(0, real_rows)
        out.index_copy_(0, tokens, rows.to(out.dtype))

    def by_k_head(self, x: Tensor) -> Tensor:
        """[B, …] -> [n * Hk, Hv / Hk, …]"""
        return x.unflatten(0, (-1, self.v_per_k))

    def times_k_head(self, x: Tensor, y: Tensor) -> Tensor:
        """x [n * Hk, …] of the K heads times y [B, …] of the V heads that share them -> [B, …]"""
        return (x[:, None] * self.by_k_head(y)).flatten(0, 1)

    @cached_property
    def decay(self) -> Tensor:  # [B, C, C] exp(b_i - b_j) on and below the diagonal
        return _decay(self.cum - self.cum.mT).tril_()

    @cached_property
    def kk(self) -> Tensor:  # [B, C, C] A without beta; its diagonal is not used
        return self.times_k_head(self.k @ self.k.mT, self.decay)

    @cached_property
    def qk(self) -> Tensor:  # [B, C, C] Q K^T * exp(b_i - b_j)
        return self.times_k_head(self.q @ self.k.mT, self.decay)

    @cached_property
    def inverse(self) -> Tensor:  # [B, C, C] (I + A)^-1, of dtype dot
        if self.saved_inverse is not None:
            return self.saved_inverse
        system = self.kk * self.beta
        eye = torch.eye(CHUNK_SIZE, dtype=self.wide, device=system.device).expand_as(system)
        return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True).to(self.dot)

    @cached_property
    def qk_start(self) -> Tensor:  # [B, 2C, Dk] exp(b) Q, then exp(b) K, of dtype dot
        both = torch.cat([self.q, self.k], dim=1)  # [n * Hk, 2C, Dk]
        return self.times_k_head(both, torch.cat([self.from_start, self.from_start], dim=1)).to(self.dot)

    @cached_property
    def k_end(self) -> Tensor:  # [B, C, Dk] exp(b_C - b) K, of dtype dot
        return self.times_k_head(self.k, self.to_end).to(self.dot)

    def read(self, entering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """entering [B, Dk, Dv], the state in dtype dot -> exp(b) Q S, E and V', [B, C, Dv] each"""
        from_state, predicted = (self.qk_start @ entering).split(CHUNK_SIZE, dim=1)
        error = self.v - predicted
        return from_state, error, self.inverse @ (error * self.beta).to(self.dot)


def _forward(
    inputs: Inputs,
    cu_seqlens: Tensor,
    out: Tensor | None,
    saved: list[tuple[Tensor, Tensor]] | None,
    last_state: Tensor | None = None,
) -> None:
    """Fills out [T, Hv, Dv], saved (entering state and inverse of each chunk) and last_state.

    last_state [S, Hv, Dk, Dv] must be zeros. Each of the three may be None.
    """
    _, k, v, _, _ = inputs
    heads = v.shape[1]
    for members, steps in sequence_groups(cu_seqlens, max(1, HEADS_AT_ONCE // heads), v.device):
        state = torch.zeros(len(members) * heads, k.shape[2], v.shape[2], dtype=working_dtype(v), device=v.device)
        for step in steps:
            chunk, active_state = _Chunk(inputs, step), state[: step.count * heads]
            entering = active_state.to(v.dtype, copy=True)
            from_state, _, value = chunk.read(entering)
            if out is not None:
                chunk.scatter(from_state.baddbmm(chunk.qk.to(v.dtype), value), out)
            active_state.mul_(chunk.chunk_decay).add_(chunk.k_end.mT @ value)
            if saved is not None:
                saved.append((entering, chunk.inverse))
        if last_state is not None:
            last_state[members.to(v.device)] = state.unflatten(0, (-1, heads))


def _backward(
    inputs: Inputs, cu_seqlens: Tensor, saved: list[tuple[Tensor, Tensor]], grad_out: Tensor
) -> tuple[Tensor, ...]:
    _, k, v, _, _ = inputs
    grads, heads = tuple(torch.empty_like(x) for x in inputs), v.shape[1]
    for members, steps in reversed(sequence_groups(cu_seqlens, max(1, HEADS_AT_ONCE // heads), v.device)):
        grad_state = torch.zeros(len(members) * heads, k.shape[2], v.shape[2], dtype=working_dtype(v), device=v.device)
        for step in reversed(steps):
            entering, inverse = saved.pop()
            chunk = _Chunk(inputs, step, inverse)
            _backward_step(chunk, entering, grad_state[: step.count * heads], grad_out, grads)
    return grads


def _backward_step(
    chunk: _Chunk, entering: Tensor, grad_state: Tensor, grad_out: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """grad_state [B, Dk, Dv] of the leaving state is overwritten by that of the entering state."""
    c = chunk
    _, error, value = c.read(entering)
    d_out = c.gather(grad_out, zero=True, dtype=c.dot)  # [B, C, Dv]
    leaving = grad_state.to(c.dot)

    d_value = torch.baddbmm(c.k_end @ leaving, c.qk.to(c.dot).mT, d_out)
    d_update = c.inverse.mT @ d_value  # gradient of beta E
    d_qk = (d_out @ value.mT).to(c.wide)  # [B, C, C]
    d_kk = (d_update @ value.mT).to(c.wide).neg_().tril_(-1)  # gradient of A
    d_k_end = (value @ leaving.mT).to(c.wide)
    d_update = d_update.to(c.wide)
    d_error = d_update * c.beta
    d_reads = torch.cat([d_out, -d_error.to(c.dot)], dim=1)  # [B, 2C, Dv] gradients of qk_start S
    d_qk_start = (d_reads @ entering.mT).to(c.wide)  # [B, 2C, Dk]

    d_beta = (d_update * error).sum(-1) + (d_kk * c.kk).sum(-1)
    d_kk = d_kk.mul_(c.beta)
    # The gradient of g_t is a sum over what decays by it: what tokens from t on read of the
    # entering state, what is left of that state in the end, and what tokens before t write and
    # tokens from t on, or the leaving state, read. Nothing cancels in it, as row and column sums of
    # one matrix would for the gradient of b: those of closed gates would drown in their rounding.
    q_part, k_part = (d_qk_start * c.qk_start).sum(-1).split(CHUNK_SIZE, dim=1)
    d_g = (q_part + k_part).flip(-1).cumsum(-1).flip(-1)  # [B, C]
    d_g += ((entering * grad_state).sum((-1, -2)) * c.chunk_decay.flatten())[:, None]
    in_chunk = (d_kk * c.kk).addcmul_(d_qk, c.qk)  # [B, C, C] by reader i, writer j
    written = in_chunk.cumsum(-1).tril_(-1).sum(-2) + (d_k_end * c.k_end).sum(-1).cumsum(-1)
    d_g[:, 1:] += written[:, :-1]

    d_qk, d_kk = (c.by_k_head(x.mul_(c.decay)).sum(1) for x in (d_qk, d_kk))  # [n * Hk, C, C]
    d_q_start, d_k_start = (
        c.by_k_head(d_qk_start.mul_(torch.cat([c.from_start] * 2, dim=1))).sum(1).split(CHUNK_SIZE, dim=1)
    )
    d_q = torch.baddbmm(d_q_start, d_qk, c.k)
    d_k = d_k_start + c.by_k_head(d_k_end.mul_(c.to_end)).sum(1)
    d_k.baddbmm_(d_qk.mT, c.q).baddbmm_(d_kk + d_kk.mT, c.k)

    grad_state.mul_(c.chunk_decay).add_(c.qk_start.mT @ d_reads)
    d_q = _norm_backward(d_q, c.q / c.scale, c.q_norm * c.scale)
    d_k = _norm_backward(d_k, c.k, c.k_norm)
    for x, out in zip((d_q, d_k, d_error, d_g[..., None], d_beta[..., None]), grads, strict=True):
        c.scatter(x, out if out.ndim == 3 else out[..., None])


def _decay(log: Tensor) -> Tensor:
    """exp(log); anything for a log above 0, which is no decay's. On a CPU less than 2^-100 is zero:
    exp is slow where it overflows or underflows, and matmuls are where products are denormal.
    """
    return F.threshold(log.clamp(-80, 0).exp_(), 2**-100, 0, inplace=True) if log.is_cpu else log.exp()


def _norm_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """The gradient of x, where unit = x * norm; exact, since norm includes the 1e-6."""
    return (grad - unit * (grad * unit).sum(-1, keepdim=True)) * norm
