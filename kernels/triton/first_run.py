"""The first run of the kernels, on a few tokens: compiles them, with smaller tiles if needed."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.errors import TritonError

from kernels import Kernels
from kernels import triton as ours
from kernels.triton.tiles import TILE_FIELDS, Tiles

KERNEL_COUNTS = {"chunk_gated_delta_rule": 7, "causal_conv1d": 2, "rms_norm_gated": 2}  # kernels per op
TOKENS = 40
OVERFLOW = re.compile(r"\w+ overflow, requires \d+ bits while \d+ bits available")  # BiShengIR's message


@dataclass(frozen=True)
class Layer:
    """The heads of a delta net layer that one process computes."""

    key_heads: int
    value_heads: int
    Dk: int
    Dv: int
    dtype: torch.dtype


class TooLargeError(RuntimeError):
    """(kernel, message of CANN's compiler): its tile does not fit into a buffer of the device."""


class _Launches(TorchDispatchMode):
    """Measures the seconds of each kernel's launches; calls on_launch(kernel) before each."""

    def __init__(self, seconds: dict[str, float], on_launch: Callable[[str], object]):
        super().__init__()
        self._seconds, self._begins = seconds, on_launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = func.name()
        if func.namespace not in TILE_FIELDS:
            return func(*args, **(kwargs or {}))
        self._begins(kernel)
        start = time.perf_counter()
        try:
            return func(*args, **(kwargs or {}))
        except TritonError as error:
            if why := OVERFLOW.search(str(error)):
                raise TooLargeError(kernel, why[0]) from error
            raise
        finally:
            self._seconds[kernel] = self._seconds.get(kernel, 0.0) + time.perf_counter() - start


def compile_kernels(
    chosen: Kernels,
    layer: Layer,
    device: torch.device,
    on_launch: Callable[[str], object],
    on_smaller_tile: Callable[[str], object],
) -> tuple[Tiles, dict[str, float]]:
    """Run the Triton ops of `chosen` once, forward and backward, until every kernel compiles.

    Returns the tiles and the seconds that each kernel took, failed attempts included. Calls
    on_launch(kernel) before each launch and on_smaller_tile(message) if a tile does not fit. Raises
    TooLargeError if there is no smaller tile, and what the compilers raise otherwise.
    """
    tiles, seconds = Tiles.of(layer.Dk, layer.Dv), dict[str, float]()
    while True:
        try:
            with _Launches(seconds, on_launch):
                run_once(with_tiles(chosen, tiles), layer, device)
            return tiles, seconds
        except TooLargeError as error:
            kernel, why = error.args
            smaller = tiles.smaller(kernel)
            if smaller is None:
                raise
            on_smaller_tile(f"{kernel}: {tiles.describe(kernel)} does not fit ({why}); {smaller.describe(kernel)}")
            tiles = smaller


def with_tiles(chosen: Kernels, tiles: Tiles) -> Kernels:
    """`chosen` with these tiles in its Triton ops."""
    given = {
        "chunk_gated_delta_rule": partial(ours.chunk_gated_delta_rule, tiles=tiles),
        "causal_conv1d": partial(ours.causal_conv1d, channels=tiles.channels),
        "rms_norm_gated": partial(ours.rms_norm_gated, elements=tiles.elements),
    }
    return replace(chosen, **{op: how for op, how in given.items() if getattr(chosen, op) is how.func})


def run_once(chosen: Kernels, layer: Layer, device: torch.device) -> None:
    """The delta net's core and norm as the model calls them, on zeros: no random numbers."""

    def zeros(*shape: int, dtype: torch.dtype = layer.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)

    keys, values = layer.key_heads * layer.Dk, layer.value_heads * layer.Dv
    cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32)
    y = chosen.causal_conv1d(zeros(TOKENS, 2 * keys + values), zeros(2 * keys + values, 4), cu_seqlens)
    q, k, v = y.split([keys, keys, values], dim=1)
    q, k, v = q.unflatten(1, (-1, layer.Dk)), k.unflatten(1, (-1, layer.Dk)), v.unflatten(1, (-1, layer.Dv))
    g, beta = (zeros(TOKENS, layer.value_heads, dtype=torch.float32) for _ in range(2))
    out = chosen.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens)
    gate = zeros(TOKENS, layer.value_heads, layer.Dv)
    out = chosen.rms_norm_gated(out, gate, zeros(layer.Dv, dtype=torch.float32), 1e-6)
    out.sum().backward()
    gate.grad.sum().item()  # type: ignore[union-attr]  # waits for the device
