"""Shared by the delta rule's kernels: loads and stores, decay matrices, a chunk's inverse.

triton-ascend splits the rows of a tile between a cube core's two vector cores, which fails if a
kernel reduces over rows. All sums therefore go along rows; a sum over columns is computed as a row
sum of the transposed product.
"""

import triton
import triton.language as tl


@triton.jit
def dot(x, y):
    """x @ y with fp32 sums; operands in fp32 stay so, which a GPU would round to TF32."""
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def load_rows(x, start, count, stride, column, C: tl.constexpr, D: tl.constexpr):
    """`count` rows of x from `start`, `stride` apart, D values from `column`, padded -> [C, D]"""
    row = tl.arange(0, C)
    first = x + tl.cast(start, tl.int64) * stride + column
    return tl.load(first + row[:, None] * stride + tl.arange(0, D)[None, :], mask=(row < count)[:, None], other=0.0)


@triton.jit
def store_rows(x, value, start, count, stride, column, C: tl.constexpr, D: tl.constexpr):
    """The inverse of load_rows: value [C, D] is cast to x's type, its rows from `count` dropped."""
    row = tl.arange(0, C)
    first = x + tl.cast(start, tl.int64) * stride + column
    pointer = first + row[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointer, value.to(x.dtype.element_ty), mask=(row < count)[:, None])


@triton.jit
def load_block(x, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, first_column, WIDTH: tl.constexpr):
    """Matrix `index` of x [N, ROWS, COLUMNS], WIDTH columns from first_column -> [ROWS, WIDTH]"""
    first = x + tl.cast(index, tl.int64) * (ROWS * COLUMNS) + first_column
    return tl.load(first + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, WIDTH)[None, :])


@triton.jit
def store_block(x, value, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, first_column, WIDTH: tl.constexpr):
    first = x + tl.cast(index, tl.int64) * (ROWS * COLUMNS) + first_column
    tl.store(first + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, WIDTH)[None, :], value.to(x.dtype.element_ty))


@triton.jit
def load_pair(x, index, C: tl.constexpr):
    """x [N, 2, C] -> the two vectors [C] at `index`"""
    first = x + tl.cast(index, tl.int64) * (2 * C)
    position = tl.arange(0, C)
    return tl.load(first + position), tl.load(first + C + position)


@triton.jit
def load_task(sequences, task, Hk: tl.constexpr, Hv: tl.constexpr, BLOCKS: tl.constexpr, BV: tl.constexpr):
    """Decode a scan's task: one sequence, one V head and BV columns of its state.

    Returns v_head, k_head, column; start and end of the sequence's tokens; its first and last
    chunk.
    """
    sequence, v_head, column = task // (Hv * BLOCKS), task // BLOCKS % Hv, task % BLOCKS * BV
    k_head = v_head // (Hv // Hk)
    start, chunk = tl.load(sequences + 2 * sequence), tl.load(sequences + 2 * sequence + 1)
    end, last = tl.load(sequences + 2 * sequence + 2), tl.load(sequences + 2 * sequence + 3)
    return v_head, k_head, column, start, end, chunk, last


@triton.jit
def decay(cum, C: tl.constexpr):
    """cum = b [C] -> [C, C], exp(b_i - b_j) on and below the diagonal, zeros above it"""
    position = tl.arange(0, C).to(tl.float32)  # the vector unit compares floats only
    return tl.exp(tl.where(position[:, None] >= position[None, :], cum[:, None] - cum[None, :], float("-inf")))


@triton.jit
def decay_transposed(cum, C: tl.constexpr):
    position = tl.arange(0, C).to(tl.float32)
    return tl.exp(tl.where(position[:, None] <= position[None, :], cum[None, :] - cum[:, None], float("-inf")))


@triton.jit
def unit_lower_inverse(system, C: tl.constexpr):
    """system: A [C, C] fp32, strictly lower triangular -> (I + A)^-1.

    Inverts diagonal blocks of 2, 4, …, C in turn: with X the inverse so far and L the entries of A
    that the next size adds, X becomes X - X L X. As stable as substitution, but all matmuls.
    """
    position = tl.arange(0, C)
    row, column = position[:, None], position[None, :]
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, system, 0.0)
    for level in tl.static_range(1, 10):
        if (2 << level) <= C:
            same = row // (2 << level) == column // (2 << level)
            below = tl.where(same & (row // (1 << level) != column // (1 << level)), system, 0.0)
            inverse -= dot(inverse, dot(below, inverse))
    return inverse
