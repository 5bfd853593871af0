"""What is Ascend's own: how large the tiles are that its buffers hold, and how many programs a launch has.

A cube core's two vector cores hold 192 KB each and split the rows of a tile between them; its own buffer for the operands of
products holds 512 KB. tests/npu/ladder_triton_compile.py compiles each kernel for these sizes.
"""

import functools
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.runtime import driver

HEAD_SIZES = (16, 32, 64, 128, 256)
CHANNELS = 2048  # of a row, which the convolution takes along at once
CONV_ROWS = 128  # that it goes down
NORM_ELEMENTS = 32 * 128  # of a tile of the gated norm

PROGRAMS = 65_535  # of a launch, at the most, where the device shares them out by itself
CUBE_CORES, VECTOR_CORES = 24, 48  # of a 910B2

FIELDS = {"delta_rule": "chunk", "causal_conv1d": "channels", "rms_norm_gated": "elements"}  # operator -> of Tiles
WALKS = ("scan", "states", "grad_states")  # over a state's columns, each by itself
LEAST = {"chunk": 16, "columns": 16, "channels": 128, "elements": 256}  # products have from 16 rows and columns


@dataclass(frozen=True)
class Tiles:
    """Of one layer's kernels; all ranks of a run have the same, since the sizes change how sums are rounded."""

    chunk: int  # tokens of a chunk of the delta rule
    columns: int  # of a state's Dv that a program takes along: of [Dk, columns] in fp32 the vector cores hold a few
    channels: int = CHANNELS
    elements: int = NORM_ELEMENTS

    @classmethod
    def of(cls, Dk: int, Dv: int) -> "Tiles":
        """The largest that fit, as our compiler lays them out."""
        return cls(64 if max(Dk, Dv) <= 128 else 32, min(Dv, 128 * 128 // Dk))

    def smaller(self, kernel: str) -> "Tiles | None":
        """Half of what `kernel` ("delta_rule::scan") is given; None: there is nothing smaller."""
        *_, field = self._fields(kernel)
        half = getattr(self, field) // 2
        return replace(self, **{field: half}) if half >= LEAST[field] else None

    def words(self, kernel: str) -> str:
        return ", ".join(f"{field} {getattr(self, field)}" for field in self._fields(kernel))

    def _fields(self, kernel: str) -> tuple[str, ...]:
        """Of a kernel, last what gets smaller first."""
        operator, _, name = kernel.partition("::")
        if name in WALKS and self.columns > LEAST["columns"]:
            return "chunk", "columns"
        return ("columns", "chunk") if name in WALKS else (FIELDS[operator],)


def cores(device: torch.device, products: bool) -> int:
    """Programs that run at the same time, each of which walks through its share of the tasks.

    More of them would wait for the first to end, and triton-ascend allots each the room that cube and vector cores need to
    pass tiles to each other. In the interpreter, on CPU tensors, there are those of a 910B2.
    """
    if device.type == "npu":
        here = _driver().utils.get_device_properties(device.index)
        return here["num_aicore" if products else "num_vectorcore"]
    if device.type == "cuda":
        return PROGRAMS
    return CUBE_CORES if products else VECTOR_CORES


@functools.cache
def _driver() -> Any:
    """The driver of triton-ascend, with which every launch asks for the stream.

    That of 3.2.0 asks torch_npu to empty the queue of its launches first, for which the host waits. It need not: what launches
    a kernel goes into that queue itself (OpCommand::Run, in the C++ that the driver writes), unless TRITON_ENABLE_TASKQUEUE
    says otherwise. triton-ascend asks without waiting since its commit 6eb831fce; torch_npu can from 2.7.1.post4 on.
    """
    active = driver.active
    ask = getattr(sys.modules["torch_npu"]._C, "_npu_getCurrentRawStreamNoWait", None)
    if ask is not None and os.environ.get("TRITON_ENABLE_TASKQUEUE", "true").lower() in ("true", "1"):
        active.get_current_stream = ask
    return active


def programs(tasks: int, device: torch.device, products: bool = False) -> int:
    return max(1, min(tasks, cores(device, products)))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
