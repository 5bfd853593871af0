"""The first part of the gated delta rule's backward: the states again, then their gradients.

Maths and names as in kernels/gated_delta_rule.py.
"""

import triton
import triton.language as tl

from kernels.triton.blocks import decay_transposed, dot, load_block, load_pair, load_rows, load_task, store_block


@triton.jit(do_not_specialize=["count_sequences", "k_stride", "v_stride"])
def states(
    k, v, inverse, gates, norms, sequences, states, count_sequences, k_stride, v_stride,
    Hk: tl.constexpr, Hv: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The forward's scan without output: writes states [N, Hv, Dk, Dv] that enter each chunk."""
    BLOCKS: tl.constexpr = Dv // BV
    for task in range(tl.program_id(0), count_sequences * Hv * BLOCKS, tl.num_programs(0)):
        v_head, k_head, column, start, end, chunk, last = load_task(sequences, task, Hk, Hv, BLOCKS, BV)
        state = tl.zeros([Dk, BV], dtype=tl.float32)
        for i in range(last - chunk):
            first, count = start + i * C, tl.minimum(C, end - start - i * C)
            index = tl.cast(chunk + i, tl.int64) * Hv + v_head
            cum, rate = load_pair(gates, index, C)
            _, k_norm = load_pair(norms, tl.cast(chunk + i, tl.int64) * Hk + k_head, C)
            total = tl.load(gates + index * (2 * C) + C - 1)
            k_tile = load_rows(k, first, count, k_stride, k_head * Dk, C, Dk)
            v_tile = load_rows(v, first, count, v_stride, v_head * Dv + column, C, BV).to(tl.float32)
            entering = state.to(k_tile.dtype)
            store_block(states, entering, index, Dk, Dv, column, BV)
            error = v_tile - dot(k_tile, entering) * (k_norm * tl.exp(cum))[:, None]
            value = dot(load_block(inverse, index, C, C, 0, C), (error * rate[:, None]).to(k_tile.dtype))
            update = (value * (k_norm * tl.exp(total - cum))[:, None]).to(k_tile.dtype)
            state = state * tl.exp(total) + dot(tl.trans(k_tile), update)


@triton.jit(do_not_specialize=["count_sequences", "q_stride", "k_stride"])
def grad_states(
    q, k, inverse, gates, norms, grad, states, sequences, grad_states, through, scale, count_sequences, q_stride, k_stride,
    Hk: tl.constexpr, Hv: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The same scan from the last chunk to the first. grad [T, Hv, Dv]: of the output.

    Writes grad_states [N, Hv, Dk, Dv] of the states that leave each chunk, and through
    [N, Hv, Dv / BV, Dk], the row sums of their product with exp(b_C) times the entering state: the
    decay's share of the gradient of b_C.
    """
    BLOCKS: tl.constexpr = Dv // BV
    for task in range(tl.program_id(0), count_sequences * Hv * BLOCKS, tl.num_programs(0)):
        v_head, k_head, column, start, end, chunk, last = load_task(sequences, task, Hk, Hv, BLOCKS, BV)
        grad_state = tl.zeros([Dk, BV], dtype=tl.float32)
        for back in range(last - chunk):
            i = last - chunk - 1 - back
            first, count = start + i * C, tl.minimum(C, end - start - i * C)
            index = tl.cast(chunk + i, tl.int64) * Hv + v_head
            cum, rate = load_pair(gates, index, C)
            q_norm, k_norm = load_pair(norms, tl.cast(chunk + i, tl.int64) * Hk + k_head, C)
            total = tl.exp(tl.load(gates + index * (2 * C) + C - 1))
            to_end = tl.exp(tl.load(gates + index * (2 * C) + C - 1) - cum)
            from_start = tl.exp(cum)
            q_tile = load_rows(q, first, count, q_stride, k_head * Dk, C, Dk)
            k_tile = load_rows(k, first, count, k_stride, k_head * Dk, C, Dk)
            d_out = load_rows(grad, first, count, Hv * Dv, v_head * Dv + column, C, BV)
            leaving = grad_state.to(k_tile.dtype)
            store_block(grad_states, leaving, index, Dk, Dv, column, BV)
            product = load_block(states, index, Dk, Dv, column, BV).to(tl.float32) * grad_state
            pointer = through + (index * BLOCKS + column // BV) * Dk + tl.arange(0, Dk)
            tl.store(pointer, tl.sum(product, axis=1) * total)
            # computed as k q^T, already transposed: row j, column i
            kq = dot(k_tile, tl.trans(q_tile)) * k_norm[:, None] * (q_norm * scale)[None, :] * decay_transposed(cum, C)
            d_value = dot(k_tile, leaving) * (k_norm * to_end)[:, None] + dot(kq.to(k_tile.dtype), d_out)
            solved = tl.trans(load_block(inverse, index, C, C, 0, C))
            d_error = dot(solved, d_value.to(k_tile.dtype)) * rate[:, None]
            d_reads = (d_out.to(tl.float32) * (q_norm * scale * from_start)[:, None]).to(k_tile.dtype)
            d_predicted = (d_error * (k_norm * from_start)[:, None]).to(k_tile.dtype)
            grad_state = grad_state * total + dot(tl.trans(q_tile), d_reads) - dot(tl.trans(k_tile), d_predicted)
