"""The one table of names: model parameters to the tensors of a Hugging Face checkpoint, and back.

The model's parameter names and layouts are the hub checkpoint's own. Two things differ. The model
stacks experts; on disk they are stacked or one tensor each, and a folder may mix both (the hub
stacks the main experts but not those of `mtp.`). And a text-only checkpoint calls the decoder
`model.`, not `model.language_model.`. What a folder has is read from its names. Nothing here reads
a file.
"""

import re
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen35.checkpoint.slices import TensorSlice
from qwen35.model.lora import adapted_by, is_adapter

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
DECODER = re.compile(r"^model\.language_model\.")

# stacked tensor -> the tensors of one expert that make up its rows, from the top
EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
STACKED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<stack>gate_up_proj|down_proj)")


@dataclass(frozen=True)
class TensorMapping:
    """A tensor on disk and the region of a model parameter that it holds."""

    disk_name: str
    region: TensorSlice  # of the parameter
    one_expert: bool = False  # the disk tensor lacks the leading axis, which has length 1 in `region`

    @property
    def disk_shape(self) -> tuple[int, ...]:
        return self.region.lengths[1:] if self.one_expert else self.region.lengths

    def to_disk(self, part: TensorSlice) -> TensorSlice:
        """Translate a part of the parameter, inside `region`, to the tensor on disk."""
        inner = part.relative_to(self.region.offsets)
        return TensorSlice(inner.offsets[1:], inner.lengths[1:]) if self.one_expert else inner

    def to_model(self, part: TensorSlice) -> TensorSlice:
        """Translate a part of the tensor on disk to the parameter."""
        if self.one_expert:
            part = TensorSlice((0, *part.offsets), (1, *part.lengths))
        return TensorSlice(tuple(a + b for a, b in zip(part.offsets, self.region.offsets, strict=True)), part.lengths)


def mappings_of(name: str, shape: Sequence[int], names: Container[str]) -> list[TensorMapping]:
    """Map the parameter `name` to its tensors on disk, in a folder with these names.

    Only experts stored one by one are several tensors; all else is one tensor.
    """
    name = _name_among(name, names)
    if first_on_disk(name, names) == name:
        return [TensorMapping(name, TensorSlice.full(shape))]
    experts, _, stack = name.rpartition(".")
    count, rows, columns = shape
    parts = EXPERT_PARTS[stack]
    height = rows // len(parts)
    return [
        TensorMapping(f"{experts}.{j}.{part}.weight", TensorSlice((j, i * height, 0), (1, height, columns)), True)
        for j in range(count)
        for i, part in enumerate(parts)
    ]


def text_only_name(name: str) -> str:
    """What a text-only checkpoint calls a parameter, and transformers' class a module."""
    return DECODER.sub("model.", name)


def _name_among(name: str, names: Container[str]) -> str:
    return text_only_name(name) if text_only_name(EMBEDDING) in names else name


def first_on_disk(name: str, names: Container[str]) -> str:
    """The first tensor that holds a parameter, in a folder with these names."""
    name = _name_among(name, names)
    match = STACKED.fullmatch(name)
    if match is None or name in names:
        return name
    first = f"{match['experts']}.0.{EXPERT_PARTS[match['stack']][0]}.weight"
    return first if first in names else name


def published_dtype(name: str) -> torch.dtype:
    """The dtype of a tensor in the published checkpoints: BF16, except for two kinds in F32."""
    is_f32 = name.endswith((".linear_attn.A_log", ".linear_attn.norm.weight"))
    return torch.float32 if is_f32 else torch.bfloat16


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are no adapters: what a checkpoint of the base holds."""
    return {name: parameter for name, parameter in model.named_parameters() if not is_adapter(name)}


def saved_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What a run's checkpoints hold: all parameters, but of a model with adapters only these."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    return {name: parameter for name, parameter in named.items() if is_adapter(name)} or named


def parameter_of(adapter: str) -> str:
    """The parameter that an adapter is added to: `<module>.weight`, or the stacked experts'."""
    adapted = adapted_by(adapter)
    return adapted if STACKED.fullmatch(adapted) else f"{adapted}.weight"


def pair_of(parameter: str) -> tuple[str, str]:
    """The names of the A and B that are added to a parameter: the inverse of `parameter_of`."""
    stem = re.sub(r"\bweight$|proj$", "lora_", parameter)
    return f"{stem}A", f"{stem}B"


def shapes_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """Name -> global shape, from `model.named_parameters()`; parameters may be sharded."""
    return {name: tuple(tensor.shape) for name, tensor in parameters}


def missing_mtp_hint(wanted: Iterable[str], stored: Iterable[str]) -> list[str]:
    """A hint for the list of missing tensors if all those of multi-token prediction are missing."""
    if not any(n.startswith("mtp.") for n in wanted) or any(n.startswith("mtp.") for n in stored):
        return []
    why = "it holds no mtp.*, which transformers and runs without model.mtp_num_layers: 1 do not save"
    return [f"{why}; start from a published checkpoint, or set model.mtp_num_layers: 0"]


def may_be_skipped(name: str, shapes: Collection[str]) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no such parameter."""
    if name.startswith("mtp."):
        return not any(n.startswith("mtp.") for n in shapes)
    return name == HEAD and HEAD not in shapes
