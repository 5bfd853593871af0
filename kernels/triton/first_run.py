"""The first run of a layer's kernels, on a few tokens: each is compiled then, and gets a smaller tile where it does not fit."""

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
from kernels.triton.tiles import FIELDS, Tiles

COUNTS = {"chunk_gated_delta_rule": 7, "causal_conv1d": 2, "rms_norm_gated": 2}  # kernels of each operator
TOKENS = 40
OVERFLOW = re.compile(r"\w+ overflow, requires \d+ bits while \d+ bits available")  # as BiShengIR says it


@dataclass(frozen=True)
class Layer:
    """The delta net's, of which a process computes so many heads."""

    key_heads: int
    value_heads: int
    Dk: int
    Dv: int
    dtype: torch.dtype


class TooLargeError(RuntimeError):
    """(kernel, why): its tile does not fit into a buffer of the device, in CANN's compiler's own words."""


class _Launches(TorchDispatchMode):
    """Adds up the seconds of each of our kernels' launches inside. `begins` is told of each before."""

    def __init__(self, seconds: dict[str, float], begins: Callable[[str], object]):
        super().__init__()
        self._seconds, self._begins = seconds, begins

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = func.name()
        if func.namespace not in FIELDS:
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
    begins: Callable[[str], object],
    falls: Callable[[str], object],
) -> tuple[Tiles, dict[str, float]]:
    """Run the operators of `chosen` once, forward and backward -> the tiles with which every kernel of ours compiles, and the
    seconds that each took, with all that were tried.

    begins: is told of each kernel before it is launched. falls: of each that does not fit, in a line, and what it gets instead.
    Raises TooLargeError where there is no smaller tile, and what the compilers raise otherwise.
    """
    tiles, seconds = Tiles.of(layer.Dk, layer.Dv), dict[str, float]()
    while True:
        try:
            with _Launches(seconds, begins):
                run_once(with_tiles(chosen, tiles), layer, device)
            return tiles, seconds
        except TooLargeError as error:
            kernel, why = error.args
            smaller = tiles.smaller(kernel)
            if smaller is None:
                raise
            falls(f"{kernel}: {tiles.words(kernel)} does not fit ({why}); {smaller.words(kernel)}")
            tiles = smaller


def with_tiles(chosen: Kernels, tiles: Tiles) -> Kernels:
    """The same, but that those of ours work with these tiles."""
    given = {
        "chunk_gated_delta_rule": partial(ours.chunk_gated_delta_rule, tiles=tiles),
        "causal_conv1d": partial(ours.causal_conv1d, channels=tiles.channels),
        "rms_norm_gated": partial(ours.rms_norm_gated, elements=tiles.elements),
    }
    return replace(chosen, **{op: how for op, how in given.items() if getattr(chosen, op) is how.func})


def run_once(chosen: Kernels, layer: Layer, device: torch.device) -> None:
    """The delta net's core and norm as the model calls them, in the same dtypes. No random numbers: they are the run's."""

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
    gate.grad.sum().item()  # type: ignore[union-attr]  # waits until all of it is done
