"""The operators of Qwen3.5: pure tensors in, tensors out, each on the packed token axis T.

The bare functions of this package are the native ones (plain torch, any device). `select` picks an implementation per op for
a device. A library named `kernels` is probed for by transformers, which parses this version and takes 0.0.0 for too old.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec

if sys.argv[:1] == ["-m"] and not find_spec("torch"):  # `python -m kernels`; its __main__ runs after the imports below
    sys.exit("python -m kernels: torch is not installed for this Python; run `source .venv/bin/activate` first")

from kernels.attention import varlen_attention
from kernels.causal_conv1d import causal_conv1d
from kernels.cross_entropy import linear_cross_entropy
from kernels.gated_delta_rule import chunk_gated_delta_rule
from kernels.moe import moe_experts
from kernels.moe_parallel import moe_experts_parallel
from kernels.norm import rms_norm, rms_norm_gated
from kernels.rotary import apply_rotary
from kernels.swiglu import swiglu

__version__ = "0.0.0"


@dataclass(frozen=True)
class Kernels:
    """One callable an op, handed to the model. Signatures, shapes and maths stand in each op's own file."""

    chunk_gated_delta_rule: Callable = chunk_gated_delta_rule
    causal_conv1d: Callable = causal_conv1d
    moe_experts: Callable = moe_experts
    moe_experts_parallel: Callable = moe_experts_parallel
    varlen_attention: Callable = varlen_attention
    rms_norm: Callable = rms_norm
    rms_norm_gated: Callable = rms_norm_gated
    apply_rotary: Callable = apply_rotary
    swiglu: Callable = swiglu
    linear_cross_entropy: Callable = linear_cross_entropy


OPS = tuple(f.name for f in fields(Kernels))


class KernelError(ValueError):
    """An op or an implementation that is asked for and not there."""


@dataclass(frozen=True)
class Source:
    """Where an implementation of that name is: a module with a function of the op's name, imported when it is chosen."""

    module: str
    stands_on: str  # the module that has to be installed
    install: str


BY_TRITON = ("chunk_gated_delta_rule", "causal_conv1d", "rms_norm_gated")
SOURCES = {
    "triton": Source(
        "kernels.triton",
        "triton",
        f"{', '.join(BY_TRITON)} stand on it: make install DEVICE=npu brings triton-ascend 3.2.0 for CANN 8.5"
        " (Python 3.10 or 3.11); for a newer CANN its release page has it, see scripts/requirements/versions.txt",
    ),
    "fla": Source("kernels.fla", "fla", "pip install fla-core and the triton-ascend that it names"),
    "torch_npu": Source("kernels.fused", "torch_npu", "make install DEVICE=npu, and CANN's set_env.sh sourced"),
    "alltoallv_gmm": Source(
        "kernels.fused_exchange", "torch_npu", "make install DEVICE=npu, and CANN's set_env.sh sourced"
    ),
}
BY_FLA = ("chunk_gated_delta_rule", "causal_conv1d")
SHORT_NAMES = {"gated_delta_rule": "chunk_gated_delta_rule"}  # that model.kernels takes as well


def implementations(device: str) -> dict[str, tuple[str, ...]]:
    """op -> the names that model.kernels takes on a device type; the first is what `auto` means.

    native, plain torch, runs anywhere. On an NPU it is slow, and only for those who ask for it by name.
    """
    if device == "npu":
        by_triton = {op: ("triton", "fla" if op in BY_FLA else "torch_npu", "native") for op in BY_TRITON}
        several = {"moe_experts_parallel": ("torch_npu", "alltoallv_gmm", "native")}
        return {op: (by_triton | several).get(op, ("torch_npu", "native")) for op in OPS}
    if device == "cuda":
        return {op: ("native", "triton") if op in BY_TRITON else ("native",) for op in OPS}
    return dict.fromkeys(OPS, ("native",))


def of_triton(chosen: Kernels) -> list[str]:
    """The ops that run as Triton kernels of ours."""
    return [op for op in BY_TRITON if getattr(chosen, op).__module__.startswith("kernels.triton.")]


def is_installed(name: str) -> bool:
    return name == "native" or find_spec(SOURCES[name].stands_on) is not None


def select(device: str, choices: Mapping[str, str] | None = None) -> Kernels:
    """The implementation of every op on `device` ("cpu", "cuda", "npu").

    `choices`: op -> "auto" or an implementation's name. Raises KernelError on an unknown op or name, and where what stands
    behind it is not installed: there is no quiet fallback.
    """
    given = choices or {}
    choices = {SHORT_NAMES.get(op, op): name for op, name in given.items()}
    if len(choices) < len(given):
        twice = next(op for op in given if op in SHORT_NAMES)
        raise KernelError(f"model.kernels: {twice} and {SHORT_NAMES[twice]} are the same op; give one of them")
    if unknown := sorted(set(choices) - set(OPS)):
        raise KernelError(f"model.kernels: no op is named {unknown[0]}; there are {', '.join(OPS)}")
    there = implementations(device)
    chosen = {}
    for op in OPS:
        name = choices.get(op, "auto")
        if name != "auto" and name not in there[op]:
            raise KernelError(f"model.kernels.{op}: {name!r} is not one of auto, {', '.join(there[op])}")
        name = there[op][0] if name == "auto" else name
        chosen[op] = getattr(Kernels, op) if name == "native" else _load(op, name, device)
    return Kernels(**chosen)


def _load(op: str, name: str, device: str) -> Callable:
    source = SOURCES[name]
    try:
        if name == "triton" and device == "npu":
            import_module("triton.backends.ascend")  # of triton-ascend: another triton has none
        return getattr(import_module(source.module), op)
    except ImportError as error:
        others = [other for other in implementations(device)[op] if other != "native"]
        others = [other for other in others if SOURCES[other].stands_on != source.stands_on]
        raise KernelError(
            f"{op}: no fused kernel for {device} here: {source.stands_on} cannot be imported ({error}); {source.install},"
            f" or ask for {''.join(f'{other}, or for ' for other in others)}the slow one: model.kernels.{op}=native"
        ) from error
