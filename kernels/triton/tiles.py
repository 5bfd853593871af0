"""What is specific to Ascend: tile sizes that fit its buffers, and how kernels are launched.

A cube core's two vector cores hold 192 KB each and split the rows of a tile between them; its
buffer for the operands of matmuls holds 512 KB. tests/npu/ladder_triton_compile.py compiles each
kernel for these sizes.
"""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.library import custom_op
from triton.runtime import driver

HEAD_SIZES = (16, 32, 64, 128, 256)
CHANNELS = 2048  # channels of a row that a convolution program takes at once
CONV_ROWS = 128  # rows of its chunk
NORM_ELEMENTS = 32 * 128  # elements per tile of the gated norm

PROGRAMS = 65_535  # maximum per launch on a GPU, which schedules them itself
CUBE_CORES, VECTOR_CORES = 24, 48  # of a 910B2

TILE_FIELDS = {"delta_rule": "chunk", "causal_conv1d": "channels", "rms_norm_gated": "elements"}  # of Tiles
SCANS = ("scan", "states", "grad_states")  # kernels that go over chunks with some columns of a state
MIN_SIZES = {"chunk": 16, "columns": 16, "channels": 128, "elements": 256}  # matmuls need 16 rows and columns


@dataclass(frozen=True)
class Tiles:
    """Tile sizes. They change how sums are rounded, so all ranks of a run use the same."""

    chunk: int  # tokens per chunk of the delta rule
    columns: int  # of a state's Dv per program: the vector cores hold a few [Dk, columns] in fp32
    channels: int = CHANNELS
    elements: int = NORM_ELEMENTS

    @classmethod
    def of(cls, Dk: int, Dv: int) -> "Tiles":
        """The largest that fit, by test with the compiler."""
        return cls(64 if max(Dk, Dv) <= 128 else 32, min(Dv, 128 * 128 // Dk))

    def smaller(self, kernel: str) -> "Tiles | None":
        """With half the tile of `kernel` ("delta_rule::scan"), or None if it is at its minimum."""
        *_, field = self._fields(kernel)
        half = getattr(self, field) // 2
        return replace(self, **{field: half}) if half >= MIN_SIZES[field] else None

    def describe(self, kernel: str) -> str:
        return ", ".join(f"{field} {getattr(self, field)}" for field in self._fields(kernel))

    def _fields(self, kernel: str) -> tuple[str, ...]:
        """The fields that size the tile of `kernel`; the last one is the first to shrink."""
        operator, _, name = kernel.partition("::")
        if name in SCANS and self.columns > MIN_SIZES["columns"]:
            return "chunk", "columns"
        return ("columns", "chunk") if name in SCANS else (TILE_FIELDS[operator],)


def cores(device: torch.device, products: bool) -> int:
    """The number of programs that run at the same time; each loops over its share of the tasks.

    More would queue, and triton-ascend allocates a workspace for each. `products`: whether the
    kernel has matmuls. On CPU tensors, in the interpreter, a 910B2 is assumed.
    """
    if device.type == "npu":
        here = _driver().utils.get_device_properties(device.index)
        return here["num_aicore" if products else "num_vectorcore"]
    if device.type == "cuda":
        return PROGRAMS
    return CUBE_CORES if products else VECTOR_CORES


@functools.cache
def _driver() -> Any:
    """triton-ascend's driver, patched to fetch the stream without draining torch_npu's task queue.

    3.2.0 drains it before every launch, for which the host waits. That is unnecessary, because the
    launch itself goes through the queue (OpCommand::Run in the driver's generated C++) unless
    TRITON_ENABLE_TASKQUEUE is off. triton-ascend fixed this in commit 6eb831fce; torch_npu has the
    function from 2.7.1.post4 on.
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


def operator(name: str, outputs: Callable) -> Callable[[Callable], Callable]:
    """Makes a launch an operator of torch. outputs(*arguments): what it returns of fake tensors."""

    def register(launch: Callable) -> Callable:
        registered = custom_op(name, launch, mutates_args=())
        registered.register_fake(outputs)
        return registered

    return register
