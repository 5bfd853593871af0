"""The operators of Qwen3.5: pure tensors in, tensors out, each on the packed token axis T.

The bare functions of this package are the native ones (plain torch, any device). `select` picks an implementation per op for
a device. A library named `kernels` is probed for by transformers, which parses this version and takes 0.0.0 for too old.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from kernels.attention import varlen_attention
from kernels.causal_conv1d import causal_conv1d
from kernels.cross_entropy import linear_cross_entropy
from kernels.gated_delta_rule import chunk_gated_delta_rule
from kernels.moe import moe_experts
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
    varlen_attention: Callable = varlen_attention
    rms_norm: Callable = rms_norm
    rms_norm_gated: Callable = rms_norm_gated
    apply_rotary: Callable = apply_rotary
    swiglu: Callable = swiglu
    linear_cross_entropy: Callable = linear_cross_entropy


OPS = tuple(f.name for f in fields(Kernels))


class KernelError(ValueError):
    """An op or an implementation that is asked for and not there."""


def implementations(device: str) -> dict[str, dict[str, Callable]]:
    """op -> name -> callable: all that can run on a device type; the first name is what `auto` means."""
    if device == "npu":
        return {op: {} for op in OPS}  # no fused set in this version, and nothing slow is chosen unasked
    return {op: {"native": getattr(Kernels, op)} for op in OPS}


def select(device: str, choices: Mapping[str, str] | None = None) -> Kernels:
    """The implementation of every op on `device` ("cpu", "cuda", "npu").

    `choices`: op -> "auto" or an implementation's name. Raises KernelError on an unknown op or name, and where `auto` has
    nothing to take: there is no quiet fallback.
    """
    choices = dict(choices or {})
    if unknown := sorted(set(choices) - set(OPS)):
        raise KernelError(f"model.kernels: no op is named {unknown[0]}; there are {', '.join(OPS)}")
    there = implementations(device)
    chosen = {}
    for op in OPS:
        name = choices.get(op, "auto")
        if name == "native":  # plain torch runs anywhere, for those who ask for it by name
            chosen[op] = getattr(Kernels, op)
        elif name == "auto" and there[op]:
            chosen[op] = next(iter(there[op].values()))
        elif name == "auto":
            raise KernelError(
                f"{op}: no fused kernel for {device} here; ask for the slow one: model.kernels.{op}=native"
            )
        elif name in there[op]:
            chosen[op] = there[op][name]
        else:
            raise KernelError(f"model.kernels.{op}: {name!r} is not one of auto, {', '.join(there[op]) or 'native'}")
    return Kernels(**chosen)
