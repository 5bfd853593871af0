"""The operators of Qwen3.5: tensors in, tensors out, on the packed token axis T.

They know no model. The functions of this package are the native implementations (plain torch, any
device); `select` picks an implementation of each op for a device.

transformers probes for a package named `kernels` and parses its version: 0.0.0 is too old for it.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from importlib.util import find_spec

if sys.argv[:1] == ["-m"] and not find_spec("torch"):  # `python -m kernels`; its __main__ runs after the imports below
    sys.exit("python -m kernels: torch is not installed for this Python; run `source .venv/bin/activate` first")

from kernels.attention import varlen_attention
from kernels.causal_conv1d import causal_conv1d
from kernels.cross_entropy import linear_cross_entropy, token_log_probs
from kernels.gated_delta_rule import chunk_gated_delta_rule
from kernels.moe import moe_experts
from kernels.moe_parallel import moe_experts_parallel
from kernels.rowwise import apply_rotary, rms_norm, rms_norm_gated, swiglu

__version__ = "0.0.0"


@dataclass(frozen=True)
class Kernels:
    """One callable per op, passed to the model; each op's file documents its shapes and maths."""

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
    token_log_probs: Callable = token_log_probs


OPS = tuple(f.name for f in fields(Kernels))


class KernelError(ValueError):
    """An unknown op, or an implementation that is unknown or not installed."""


@dataclass(frozen=True)
class Provider:
    """A named set of implementations, imported when selected."""

    module: str  # with a function per op; of torch_npu, with the primitives of all ops
    requires: str  # the module that must be installed
    install: str  # how


TRITON_OPS = ("chunk_gated_delta_rule", "causal_conv1d", "rms_norm_gated")
PROVIDERS = {
    "triton": Provider(
        "kernels.triton",
        "triton",
        f"{', '.join(TRITON_OPS)} need it: make install DEVICE=npu installs triton-ascend 3.2.0 for CANN 8.5"
        " (Python 3.10 or 3.11); for a newer CANN take it from its release page, see scripts/requirements/versions.txt",
    ),
    "fla": Provider("kernels.fla", "fla", "pip install fla-core and the triton-ascend that it names"),
    "torch_npu": Provider("kernels.npu", "torch_npu", "make install DEVICE=npu, and CANN's set_env.sh sourced"),
    "alltoallv_gmm": Provider(
        "kernels.fused_exchange", "torch_npu", "make install DEVICE=npu, and CANN's set_env.sh sourced"
    ),
}
FLA_OPS = ("chunk_gated_delta_rule", "causal_conv1d")
OP_ALIASES = {"gated_delta_rule": "chunk_gated_delta_rule"}  # also accepted in model.kernels


def implementations(device: str) -> dict[str, tuple[str, ...]]:
    """op -> the names that model.kernels accepts on a device type; `auto` means the first.

    native (plain torch) runs anywhere, but is slow on an NPU, where it must be selected by name.
    """
    if device == "npu":
        names = {op: ("triton", "fla" if op in FLA_OPS else "torch_npu", "native") for op in TRITON_OPS}
        names["moe_experts_parallel"] = ("torch_npu", "alltoallv_gmm", "native")
        return {op: names.get(op, ("torch_npu", "native")) for op in OPS}
    if device == "cuda":
        return {op: ("native", "triton") if op in TRITON_OPS else ("native",) for op in OPS}
    return dict.fromkeys(OPS, ("native",))


def triton_ops(chosen: Kernels) -> list[str]:
    """The ops that run as this package's Triton kernels."""
    return [op for op in TRITON_OPS if getattr(chosen, op).__module__.startswith("kernels.triton.")]


def is_installed(name: str) -> bool:
    return name == "native" or find_spec(PROVIDERS[name].requires) is not None


def select(device: str, choices: Mapping[str, str] | None = None) -> Kernels:
    """The implementation of every op on `device` ("cpu", "cuda", "npu").

    choices: op -> "auto" or an implementation's name. Raises KernelError on an unknown op or name,
    and if what the implementation requires is not installed: there is no silent fallback.
    """
    requested = choices or {}
    choices = {OP_ALIASES.get(op, op): name for op, name in requested.items()}
    if len(choices) < len(requested):
        alias = next(op for op in requested if op in OP_ALIASES)
        raise KernelError(f"model.kernels: {alias} and {OP_ALIASES[alias]} are the same op; give one of them")
    if unknown := sorted(set(choices) - set(OPS)):
        raise KernelError(f"model.kernels: no op is named {unknown[0]}; the ops are {', '.join(OPS)}")
    available = implementations(device)
    chosen = {}
    for op in OPS:
        name = choices.get(op, "auto")
        if name != "auto" and name not in available[op]:
            raise KernelError(f"model.kernels.{op}: {name!r} is not one of auto, {', '.join(available[op])}")
        name = available[op][0] if name == "auto" else name
        chosen[op] = getattr(Kernels, op) if name == "native" else _load(op, name, device)
    return Kernels(**chosen)


def _load(op: str, name: str, device: str) -> Callable:
    provider = PROVIDERS[name]
    try:
        if name == "triton" and device == "npu":
            import_module("triton.backends.ascend")  # only triton-ascend has it
        module = import_module(provider.module)
        if name == "torch_npu":  # the same algorithms over other primitives
            return partial(getattr(Kernels, op), primitives=module)
        return getattr(module, op)
    except ImportError as error:
        others = [other for other in implementations(device)[op] if other != "native"]
        others = [other for other in others if PROVIDERS[other].requires != provider.requires]
        raise KernelError(
            f"{op}: {provider.requires} cannot be imported ({error}); {provider.install}, or set model.kernels.{op} to"
            f" {''.join(f'{other} or ' for other in others)}native, which is slow on {device}"
        ) from error
