"""The gated delta rule's forward kernels: per-chunk preparation, then the scan over chunks.

Maths and names as in kernels/gated_delta_rule.py. q and k are multiplied as they are: their norms,
the decay and the scale are applied to the rows and columns of the products.
"""

import triton
import triton.language as tl

from kernels.triton.blocks import (
    decay,
    dot,
    load_block,
    load_pair,
    load_rows,
    load_task,
    store_block,
    store_rows,
    unit_lower_inverse,
)


@triton.jit(do_not_specialize=["count_chunks", "q_stride", "k_stride"])
def prepare(
    q, k, g, beta, chunks, gates, norms, count_chunks, q_stride, k_stride,
    Hk: tl.constexpr, Hv: tl.constexpr, HEADS: tl.constexpr, Dk: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes gates [N, Hv, 2, C], running sums of g and beta; norms [N, Hk, 2, C], 1/|q|, 1/|k|.

    chunks as in chunks.py; HEADS: Hv rounded up to a power of two. A task is a chunk with all
    heads; without matmuls, so that it runs on vector cores only.
    """
    row, head = tl.arange(0, C), tl.arange(0, HEADS)
    for chunk in range(tl.program_id(0), count_chunks, tl.num_programs(0)):
        start, count = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1)
        offset = tl.cast(start, tl.int64) * Hv + row[:, None] * Hv + head[None, :]
        mask = (row < count)[:, None] & (head < Hv)[None, :]
        first = gates + tl.cast(chunk, tl.int64) * (Hv * 2 * C)
        out, exists = head[:, None] * (2 * C) + row[None, :], (head < Hv)[:, None]
        cum = tl.cumsum(tl.load(g + offset, mask=mask, other=0.0).to(tl.float32), axis=0)
        tl.store(first + out, tl.trans(cum), mask=exists)
        tl.store(first + C + out, tl.trans(tl.load(beta + offset, mask=mask, other=0.0).to(tl.float32)), mask=exists)
        for k_head in range(Hk):
            first = norms + (tl.cast(chunk, tl.int64) * Hk + k_head) * (2 * C)
            q_tile = load_rows(q, start, count, q_stride, k_head * Dk, C, Dk).to(tl.float32)
            tl.store(first + row, tl.rsqrt(tl.sum(q_tile * q_tile, axis=1) + 1e-6))
            k_tile = load_rows(k, start, count, k_stride, k_head * Dk, C, Dk).to(tl.float32)
            tl.store(first + C + row, tl.rsqrt(tl.sum(k_tile * k_tile, axis=1) + 1e-6))


@triton.jit(do_not_specialize=["count_chunks", "k_stride"])
def invert(
    k, chunks, gates, norms, inverse, count_chunks, k_stride,
    Hk: tl.constexpr, Hv: tl.constexpr, Dk: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes inverse [N, Hv, C, C], of I + A. A task is a chunk and a K head with its V heads."""
    G: tl.constexpr = Hv // Hk
    position = tl.arange(0, C).to(tl.float32)
    for task in range(tl.program_id(0), count_chunks * Hk, tl.num_programs(0)):
        chunk, k_head = task // Hk, task % Hk
        start, count = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1)
        _, k_norm = load_pair(norms, task, C)
        k_tile = load_rows(k, start, count, k_stride, k_head * Dk, C, Dk)
        kk = dot(k_tile, tl.trans(k_tile)) * k_norm[:, None] * k_norm[None, :]
        for i in range(G):
            index = tl.cast(task, tl.int64) * G + i
            cum, rate = load_pair(gates, index, C)
            below = tl.where(position[:, None] > position[None, :], kk * decay(cum, C) * rate[:, None], 0.0)
            store_block(inverse, unit_lower_inverse(below, C), index, C, C, 0, C)


@triton.jit(do_not_specialize=["count_sequences", "q_stride", "k_stride", "v_stride"])
def scan(
    q, k, v, inverse, gates, norms, sequences, out, scale, count_sequences, q_stride, k_stride, v_stride,
    Hk: tl.constexpr, Hv: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes out [T, Hv, Dv]; sequences as in chunks.py.

    A task is a sequence, a V head and BV columns of its state, from chunk to chunk.
    """
    BLOCKS: tl.constexpr = Dv // BV
    for task in range(tl.program_id(0), count_sequences * Hv * BLOCKS, tl.num_programs(0)):
        v_head, k_head, column, start, end, chunk, last = load_task(sequences, task, Hk, Hv, BLOCKS, BV)
        state = tl.zeros([Dk, BV], dtype=tl.float32)
        for i in range(last - chunk):
            first, count = start + i * C, tl.minimum(C, end - start - i * C)
            index = tl.cast(chunk + i, tl.int64) * Hv + v_head
            cum, rate = load_pair(gates, index, C)
            q_norm, k_norm = load_pair(norms, tl.cast(chunk + i, tl.int64) * Hk + k_head, C)
            total = tl.load(gates + index * (2 * C) + C - 1)
            from_start = tl.exp(cum)
            q_tile = load_rows(q, first, count, q_stride, k_head * Dk, C, Dk)
            k_tile = load_rows(k, first, count, k_stride, k_head * Dk, C, Dk)
            v_tile = load_rows(v, first, count, v_stride, v_head * Dv + column, C, BV).to(tl.float32)
            entering = state.to(k_tile.dtype)
            error = v_tile - dot(k_tile, entering) * (k_norm * from_start)[:, None]
            value = dot(load_block(inverse, index, C, C, 0, C), (error * rate[:, None]).to(k_tile.dtype))
            qk = dot(q_tile, tl.trans(k_tile)) * (q_norm * scale)[:, None] * k_norm[None, :] * decay(cum, C)
            from_state = dot(q_tile, entering) * (q_norm * scale * from_start)[:, None]
            result = from_state + dot(qk.to(k_tile.dtype), value.to(k_tile.dtype))
            store_rows(out, result, first, count, Hv * Dv, v_head * Dv + column, C, BV)
            update = (value * (k_norm * tl.exp(total - cum))[:, None]).to(k_tile.dtype)
            state = state * tl.exp(total) + dot(tl.trans(k_tile), update)
