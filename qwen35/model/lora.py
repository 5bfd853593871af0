"""Adapters on a plain model: which modules get one, what they start from, and how to do without.

Parameters are named after what they adapt: `….q_proj.lora_A` [r, in] and `….q_proj.lora_B`
[out, r]; the routed experts', one for each, `….experts.gate_up_lora_A` [E, r, in] and so on.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qwen35.errors import UserError
from qwen35.model.gated_delta_net import Conv1d
from qwen35.model.linear import LoraLinear
from qwen35.model.moe import ADAPTERS, Experts, Router
from qwen35.model.qwen35 import Qwen35

# modules with weights that can have no adapter -> why
REFUSED: dict[type[nn.Module], str] = {
    nn.Embedding: "an embedding, whose adapter a tied head would share",
    nn.Conv3d: "a convolution",
    Conv1d: "a convolution of four taps a channel, which has no lower rank",
    Router: "the router, which stays as it is: its fp32 weight is shared by no server's adapters",
}


class LoraError(UserError):
    """A name that matches nothing, or something that cannot have an adapter."""


@dataclass(frozen=True)
class LoraSpec:
    """Which modules have adapters, and of which rank; `*` and `{*}` in a name match one level."""

    r: int
    alpha: float
    targets: tuple[str, ...]  # ends of modules' names, of whole levels
    target_parameters: tuple[str, ...]  # ends of the names of the experts' weights
    exclude: tuple[str, ...]  # ends of names that are left out
    expert_r: int
    use_rslora: bool

    @property
    def scale(self) -> float:
        """Of all adapters, the experts' too, whatever their rank."""
        return self.alpha / self.r**0.5 if self.use_rslora else self.alpha / self.r


def add_adapters(model: Qwen35, spec: LoraSpec) -> None:
    """Give a plain model adapters, whose values are undefined, and freeze all else. LoraError."""
    model.requires_grad_(False)
    layers = dict(model.model.named_modules(prefix="model"))
    linears = {name: module for name, module in layers.items() if isinstance(module, nn.Linear)}
    experts = {name: module for name, module in layers.items() if isinstance(module, Experts)}
    stacks = {f"{name}.{stack}_proj": (module, stack) for name, module in experts.items() for stack in ADAPTERS}
    others = {name: m for name, m in model.named_modules() if m._parameters and name not in {*linears, *experts}}
    _check(spec.exclude, [*linears, *others, *stacks], "module", linears)
    for name in _matching(spec.targets, [*linears, *others], spec.exclude, "linear module", linears):
        if name in others:
            why = next((why for kind, why in REFUSED.items() if isinstance(others[name], kind)), "no linear map")
            why = "the head, whose adapter a tied embedding would share" if name == "lm_head" else why
            raise LoraError(f"{name} can have no adapter: it is {why}; leave it out, or name it in exclude_modules")
        parent, _, leaf = name.rpartition(".")
        setattr(layers[parent], leaf, LoraLinear(linears[name], spec.r, spec.scale))
    for name in _matching(spec.target_parameters, [*stacks], spec.exclude, "weight of routed experts", stacks):
        module, stack = stacks[name]
        module.add_adapter(stack, spec.expert_r, spec.scale)
    if not any(p.requires_grad for p in model.parameters()):
        raise LoraError(f"{', '.join(spec.exclude)} leave no module with an adapter")


def _matching(
    patterns: Sequence[str], names: Sequence[str], exclude: Sequence[str], what: str, offered: Iterable[str]
) -> Iterator[str]:
    """The names that end as one of the patterns does and as none of `exclude`, in their order."""
    _check(patterns, names, what, offered)
    for name in names:
        if any(_ends(name, p) for p in patterns) and not any(_ends(name, p) for p in exclude):
            yield name


def _check(patterns: Sequence[str], names: Sequence[str], what: str, offered: Iterable[str]) -> None:
    """A message about a pattern that matches nothing names the ends of those that are offered."""
    for pattern in patterns:
        if not any(_ends(name, pattern) for name in names):
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in offered)) or "none"
            raise LoraError(f"{pattern} matches no {what} of this model; there are {ends}")


def _ends(name: str, pattern: str) -> bool:
    levels = pattern.replace("{*}", "*").split(".")
    tail = name.split(".")[-len(levels) :]
    return len(tail) == len(levels) and all(map(fnmatchcase, tail, levels))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith(("lora_A", "lora_B"))


def adapted_by(name: str) -> str:
    """The linear module, or the experts' weight, that the adapter parameter `name` adapts."""
    before = name.rpartition("lora_")[0]
    return before[:-1] if before.endswith(".") else f"{before}proj"


def initial_adapter(name: str, shape: Sequence[int], seed: int, expert: int | None = None) -> Tensor:
    """A parameter of an adapter before the first step, or that of one expert; fp32, on the CPU.

    A is uniform within 1 / sqrt(in), B zero, so that the model is the one without adapters.
    """
    if name.endswith("lora_B"):
        return torch.zeros(*shape)
    digest = hashlib.sha256(f"{seed} {name} {expert}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = shape[-1] ** -0.5
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, a model, plain or sharded, computes what it would without its adapters."""
    adapted = [m for m in model.modules() if isinstance(m, LoraLinear | Experts)]
    scales = [m.scale for m in adapted]
    try:
        for module in adapted:
            module.scale = 0.0
        yield
    finally:
        for module, scale in zip(adapted, scales, strict=True):
            module.scale = scale
