"""The last part of the gated delta rule's backward: each chunk's gradients of q, k, v, g and beta.

The gradient of g_t is a sum over what decays by it: what tokens from t on read of the entering
state, what is left of that state in the end, and what tokens before t write and tokens from t on,
or the leaving state, read. Nothing cancels in it, as row and column sums of one matrix would for
the gradient of b, the running sum of g: those of closed gates would drown in their rounding.
Names as in gated_delta_rule.py.
"""

import triton
import triton.language as tl

from kernels.triton.blocks import decay, decay_transposed, dot, load_block, load_pair, load_rows, store_rows


@triton.jit(do_not_specialize=["count_chunks", "q_stride", "k_stride", "v_stride"])
def gradients(
    q, k, v, inverse, gates, norms, grad, states, grad_states, chunks, grad_q, grad_k, grad_v, grad_gates,
    scale, count_chunks, q_stride, k_stride, v_stride,
    Hk: tl.constexpr, Hv: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes grad_v [T, Hv, Dv]; grad_q, grad_k [T, Hv, Dk] per V head; grad_gates [N, Hv, 3, C].

    grad_gates: what is read from each token on, of the entering state and of the writes before the
    token; the gradient of beta; each token's writes that leave the chunk.
    A task is a chunk and a V head.
    """
    row, position = tl.arange(0, C), tl.arange(0, C).to(tl.float32)
    for task in range(tl.program_id(0), count_chunks * Hv, tl.num_programs(0)):
        chunk, v_head = task // Hv, task % Hv
        k_head = v_head // (Hv // Hk)
        start, count = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1)
        cum, rate = load_pair(gates, task, C)
        q_norm, k_norm = load_pair(norms, tl.cast(chunk, tl.int64) * Hk + k_head, C)
        from_start = tl.exp(cum)
        to_end = tl.exp(tl.load(gates + tl.cast(task, tl.int64) * (2 * C) + C - 1) - cum)
        first = grad_gates + tl.cast(task, tl.int64) * (3 * C)
        q_tile = load_rows(q, start, count, q_stride, k_head * Dk, C, Dk)
        k_tile = load_rows(k, start, count, k_stride, k_head * Dk, C, Dk)
        v_tile = load_rows(v, start, count, v_stride, v_head * Dv, C, Dv).to(tl.float32)
        d_out = load_rows(grad, start, count, Hv * Dv, v_head * Dv, C, Dv)
        state = load_block(states, task, Dk, Dv, 0, Dv)
        leaving = load_block(grad_states, task, Dk, Dv, 0, Dv)
        solved = load_block(inverse, task, C, C, 0, C)

        predicted = dot(k_tile, state) * (k_norm * from_start)[:, None]
        error = v_tile - predicted
        value = dot(solved, (error * rate[:, None]).to(k_tile.dtype))
        values = value.to(k_tile.dtype)
        from_end = dot(k_tile, leaving) * (k_norm * to_end)[:, None]
        tl.store(first + 2 * C + row, tl.sum(value * from_end, axis=1))
        kq = dot(k_tile, tl.trans(q_tile)) * k_norm[:, None] * (q_norm * scale)[None, :] * decay_transposed(cum, C)
        d_value = from_end + dot(kq.to(k_tile.dtype), d_out)
        d_update = dot(tl.trans(solved), d_value.to(k_tile.dtype))
        d_v = d_update * rate[:, None]
        store_rows(grad_v, d_v, start, count, Hv * Dv, v_head * Dv, C, Dv)
        reads = 0.0 - tl.sum(d_v * predicted, axis=1)

        # the negative of A's gradient below the diagonal; above it, its transpose
        updates = d_update.to(k_tile.dtype)
        below = tl.where(position[:, None] > position[None, :], dot(updates, tl.trans(values)) * decay(cum, C), 0.0)
        kk = dot(k_tile, tl.trans(k_tile)) * k_norm[:, None] * k_norm[None, :]
        tl.store(first + C + row, tl.sum(d_update * error, axis=1) - tl.sum(below * kk, axis=1))
        above = dot(values, tl.trans(updates)) * decay_transposed(cum, C)
        above = tl.where(position[:, None] < position[None, :], above * rate[None, :], 0.0)
        d_kk = (below * rate[:, None] + above) * k_norm[None, :]
        d_k = dot(values, tl.trans(leaving)) * to_end[:, None] - dot(d_kk.to(k_tile.dtype), k_tile)
        d_k -= dot(d_v.to(k_tile.dtype), tl.trans(state)) * from_start[:, None]
        d_kq = dot(values, tl.trans(d_out)) * decay_transposed(cum, C) * (q_norm * scale)[None, :]
        d_k += dot(d_kq.to(k_tile.dtype), q_tile)
        unit_k = k_tile.to(tl.float32) * k_norm[:, None]
        d_k = (d_k - unit_k * tl.sum(d_k * unit_k, axis=1)[:, None]) * k_norm[:, None]
        store_rows(grad_k, d_k, start, count, Hv * Dk, v_head * Dk, C, Dk)

        from_state = dot(q_tile, state) * (q_norm * scale * from_start)[:, None]
        reads += tl.sum(d_out.to(tl.float32) * from_state, axis=1)
        d_qk = dot(d_out, tl.trans(values)) * decay(cum, C) * k_norm[None, :]
        # row: reader, column: writer; the last token writes nothing that the chunk reads later, so
        # its column has the reads of the entering state; then the sums over readers from t on
        in_chunk = d_qk * dot(q_tile, tl.trans(k_tile)) * (q_norm * scale)[:, None] - below * rate[:, None] * kk
        in_chunk = tl.where(position[:, None] > position[None, :], in_chunk, 0.0)
        writer = tl.where(position < C - 1, position, -1.0)
        in_chunk = tl.where(writer[None, :] < 0.0, reads[:, None], in_chunk)
        later = tl.where(position[:, None] <= position[None, :], 1.0, 0.0)
        read_later = tl.where(position[:, None] > writer[None, :], dot(later, in_chunk), 0.0)
        tl.store(first + row, tl.sum(read_later, axis=1))
        d_q = dot(d_out, tl.trans(state)) * from_start[:, None] + dot(d_qk.to(k_tile.dtype), k_tile)
        unit_q = q_tile.to(tl.float32) * q_norm[:, None]
        d_q = (d_q - unit_q * tl.sum(d_q * unit_q, axis=1)[:, None]) * (q_norm * scale)[:, None]
        store_rows(grad_q, d_q, start, count, Hv * Dk, v_head * Dk, C, Dk)


@triton.jit(do_not_specialize=["count_chunks"])
def finish(
    grad_gates, through, part_q, part_k, chunks, grad_g, grad_beta, grad_q, grad_k, count_chunks,
    Hk: tl.constexpr, Hv: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, Dk: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """grad_gates as above, through [N, Hv, PARTS] of grad_states -> grad_g, grad_beta [T, Hv].

    If V heads share a K head, also sums part_q and part_k [T, Hv, Dk] into grad_q, grad_k
    [T, Hk, Dk]. HEADS as in prepare. A task is a chunk with all heads; runs on vector cores only.
    """
    G: tl.constexpr = Hv // Hk
    row, head, part = tl.arange(0, C), tl.arange(0, HEADS), tl.arange(0, Dk)
    exists = (head < Hv)[:, None]
    for chunk in range(tl.program_id(0), count_chunks, tl.num_programs(0)):
        start, count = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1)
        index = tl.cast(chunk, tl.int64) * Hv
        first = grad_gates + index * (3 * C) + head[:, None] * (3 * C) + row[None, :]
        left = tl.zeros([HEADS], dtype=tl.float32)
        for block in tl.static_range(PARTS // Dk):
            state_parts = through + index * PARTS + head[:, None] * PARTS + (block * Dk + part)[None, :]
            left += tl.sum(tl.load(state_parts, mask=exists, other=0.0), axis=1)
        leaving_before = tl.load(first + 2 * C - 1, mask=exists & (row > 0)[None, :], other=0.0)  # [HEADS, C]
        d_g = left[:, None] + tl.cumsum(leaving_before, axis=1) + tl.load(first, mask=exists, other=0.0)
        out = tl.cast(start, tl.int64) * Hv + row[:, None] * Hv + head[None, :]
        mask = (row < count)[:, None] & (head < Hv)[None, :]
        tl.store(grad_g + out, tl.trans(d_g), mask=mask)
        tl.store(grad_beta + out, tl.trans(tl.load(first + C, mask=exists, other=0.0)), mask=mask)
        if G > 1:
            for k_head in range(Hk):
                d_q, d_k = tl.zeros([C, Dk], dtype=tl.float32), tl.zeros([C, Dk], dtype=tl.float32)
                for i in range(G):
                    column = (k_head * G + i) * Dk
                    d_q += load_rows(part_q, start, count, Hv * Dk, column, C, Dk).to(tl.float32)
                    d_k += load_rows(part_k, start, count, Hv * Dk, column, C, Dk).to(tl.float32)
                store_rows(grad_q, d_q, start, count, Hk * Dk, k_head * Dk, C, Dk)
                store_rows(grad_k, d_k, start, count, Hk * Dk, k_head * Dk, C, Dk)
