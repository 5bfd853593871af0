"""What the delta rule's kernels share: rows in and out, the decay between two tokens, the inverse of a chunk's system.

Rows of a tile are shared out between a cube core's two vector cores, which only works as long as nothing is added up over
rows: sums go along a row, and what needs the columns' sums multiplies the other way round.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(x, start, count, stride, column, C: tl.constexpr, D: tl.constexpr):
    """Rows start … start + count - 1 of x, which are `stride` apart, D values from `column` -> [C, D], zeros below."""
    row = tl.arange(0, C)
    first = x + tl.cast(start, tl.int64) * stride + column
    return tl.load(first + row[:, None] * stride + tl.arange(0, D)[None, :], mask=(row < count)[:, None], other=0.0)


@triton.jit
def store_rows(x, value, start, count, stride, column, C: tl.constexpr, D: tl.constexpr):
    """The inverse; value [C, D] is rounded to x's type, its rows from `count` are dropped."""
    row = tl.arange(0, C)
    first = x + tl.cast(start, tl.int64) * stride + column
    place = first + row[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(place, value.to(x.dtype.element_ty), mask=(row < count)[:, None])


@triton.jit
def load_block(x, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, first_column, WIDTH: tl.constexpr):
    """Matrix `index` of x [N, ROWS, COLUMNS], its columns from first_column -> [ROWS, WIDTH]"""
    first = x + tl.cast(index, tl.int64) * (ROWS * COLUMNS) + first_column
    return tl.load(first + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, WIDTH)[None, :])


@triton.jit
def store_block(x, value, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, first_column, WIDTH: tl.constexpr):
    first = x + tl.cast(index, tl.int64) * (ROWS * COLUMNS) + first_column
    tl.store(first + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, WIDTH)[None, :], value.to(x.dtype.element_ty))


@triton.jit
def load_pair(x, index, C: tl.constexpr):
    """x [N, 2, C] -> its two vectors [C]"""
    first = x + tl.cast(index, tl.int64) * (2 * C)
    place = tl.arange(0, C)
    return tl.load(first + place), tl.load(first + C + place)


@triton.jit
def load_task(sequences, task, Hk: tl.constexpr, Hv: tl.constexpr, BLOCKS: tl.constexpr, BV: tl.constexpr):
    """Which of the walks it is, and from where to where: a sequence, a V head and BV columns of its state.

    -> the V head, its K head, the first column; of the sequence (as in chunks.py) the tokens' start and end, the chunks'
    """
    sequence, v_head, column = task // (Hv * BLOCKS), task // BLOCKS % Hv, task % BLOCKS * BV
    k_head = v_head // (Hv // Hk)
    start, chunk = tl.load(sequences + 2 * sequence), tl.load(sequences + 2 * sequence + 1)
    end, last = tl.load(sequences + 2 * sequence + 2), tl.load(sequences + 2 * sequence + 3)
    return v_head, k_head, column, start, end, chunk, last


@triton.jit
def decay(cum, C: tl.constexpr):
    """exp(b_i - b_j) on and below the diagonal, zeros above, of cum [C]"""
    place = tl.arange(0, C).to(tl.float32)  # compared as floats, which the vector unit can
    return tl.exp(tl.where(place[:, None] >= place[None, :], cum[:, None] - cum[None, :], float("-inf")))


@triton.jit
def decay_transposed(cum, C: tl.constexpr):
    place = tl.arange(0, C).to(tl.float32)
    return tl.exp(tl.where(place[:, None] <= place[None, :], cum[None, :] - cum[:, None], float("-inf")))


@triton.jit
def unit_lower_inverse(system, C: tl.constexpr):
    """(I + A)^-1 [C, C] of A, strictly lower, fp32, by halves: blocks of 2, 4, …, C along the diagonal are inverted in turn.

    With X the inverse so far, and L what of A the next size adds below the diagonal, it becomes X - X L X: as stable as
    substitution, and all of it matrix products.
    """
    place = tl.arange(0, C)
    row, column = place[:, None], place[None, :]
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, system, 0.0)
    for level in tl.static_range(1, 10):
        if (2 << level) <= C:
            same = row // (2 << level) == column // (2 << level)
            below = tl.where(same & (row // (1 << level) != column // (1 << level)), system, 0.0)
            inverse -= tl.dot(inverse, tl.dot(below, inverse, input_precision="ieee"), input_precision="ieee")
    return inverse
