"""What is Ascend's own: how large the tiles are that its buffers hold, and how many programs a launch may have.

A cube core's two vector cores hold 192 KB each and split the rows of a tile between them; its own buffer for the operands of
products holds 512 KB. tests/npu/ladder_triton.py compiles each kernel for these sizes.
"""

HEAD_SIZES = (16, 32, 64, 128, 256)
PROGRAMS = 65_535  # of a launch; a kernel walks through what is left by itself


def chunk_size(Dk: int, Dv: int) -> int:
    """Tokens of a chunk."""
    return 64 if max(Dk, Dv) <= 128 else 32


def state_columns(Dk: int, Dv: int) -> int:
    """How many of a state's Dv columns a program takes along: of [Dk, columns] in fp32 the vector cores hold a few."""
    return min(Dv, 128 * 128 // Dk)


def programs(tasks: int) -> int:
    return max(1, min(tasks, PROGRAMS))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


CHANNELS = 2048  # of a row, which the convolution takes along at once
CONV_ROWS = 128  # that it goes down
NORM_ELEMENTS = 32 * 128  # of a tile of the gated norm
VECTOR_CORES = 48  # of a 910B2; fewer elsewhere, and then some take two turns


def walkers(tasks: int, beside: int = 1) -> int:
    """Programs of a kernel that adds up as it walks through rows: for each vector core one, with those beside it."""
    return max(1, min(tasks, VECTOR_CORES // beside))
