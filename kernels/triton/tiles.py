"""What is Ascend's own: how large the tiles are that its buffers hold, and how many programs a launch has.

A cube core's two vector cores hold 192 KB each and split the rows of a tile between them; its own buffer for the operands of
products holds 512 KB. tests/npu/ladder_triton_compile.py compiles each kernel for these sizes.
"""

import torch
from triton.runtime import driver

HEAD_SIZES = (16, 32, 64, 128, 256)
CHANNELS = 2048  # of a row, which the convolution takes along at once
CONV_ROWS = 128  # that it goes down
NORM_ELEMENTS = 32 * 128  # of a tile of the gated norm

PROGRAMS = 65_535  # of a launch, at the most, where the device shares them out by itself
CUBE_CORES, VECTOR_CORES = 24, 48  # of a 910B2


def chunk_size(Dk: int, Dv: int) -> int:
    """Tokens of a chunk."""
    return 64 if max(Dk, Dv) <= 128 else 32


def state_columns(Dk: int, Dv: int) -> int:
    """How many of a state's Dv columns a program takes along: of [Dk, columns] in fp32 the vector cores hold a few."""
    return min(Dv, 128 * 128 // Dk)


def cores(device: torch.device, products: bool) -> int:
    """Programs that run at the same time, each of which walks through its share of the tasks.

    More of them would wait for the first to end, and triton-ascend allots each the room that cube and vector cores need to
    pass tiles to each other. In the interpreter, on CPU tensors, there are those of a 910B2.
    """
    if device.type == "npu":
        here = driver.active.utils.get_device_properties(device.index)
        return here["num_aicore" if products else "num_vectorcore"]
    if device.type == "cuda":
        return PROGRAMS
    return CUBE_CORES if products else VECTOR_CORES


def programs(tasks: int, device: torch.device, products: bool = False) -> int:
    return max(1, min(tasks, cores(device, products)))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
