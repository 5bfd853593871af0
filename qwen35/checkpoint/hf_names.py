"""The one table of names: which tensors of a Hugging Face checkpoint make up a parameter of the model, and back.

The model's parameter names and layouts are the hub checkpoint's own. Only experts differ: the model stacks them, on
disk they are stacked or one tensor each, and a folder may mix both (the hub stacks the main experts and not those of
`mtp.`). Which of the two a folder has is read from its names.
"""

import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwen35.checkpoint.slices import TensorSlice, TensorSpec

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"

# hub: main experts stacked, MTP experts one tensor each; per_expert: all one tensor each, as transformers'
# save_pretrained writes them; stacked: all stacked, as the model has them
Layout = Literal["hub", "per_expert", "stacked"]

# stacked tensor -> the tensors of one expert that make up its rows, from the top
EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
STACKED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<stack>gate_up_proj|down_proj)")
ONE_EXPERT = re.compile(
    r"(?P<experts>.+\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight"
)


@dataclass(frozen=True)
class Place:
    """A tensor on disk, and which part of a model's tensor it is."""

    name: str  # on disk
    region: TensorSlice  # in the model's tensor
    one_expert: bool = False  # the tensor on disk lacks the leading axis, which has length 1 in the region

    @property
    def disk_shape(self) -> tuple[int, ...]:
        return self.region.lengths[1:] if self.one_expert else self.region.lengths

    def on_disk(self, part: TensorSlice) -> TensorSlice:
        """`part` of the model's tensor, as a part of the tensor on disk."""
        seen = part.relative_to(self.region.offsets)
        return TensorSlice(seen.offsets[1:], seen.lengths[1:]) if self.one_expert else seen

    def in_model(self, part: TensorSlice) -> TensorSlice:
        """`part` of the tensor on disk, as a part of the model's tensor."""
        start, size = ((0, *part.offsets), (1, *part.lengths)) if self.one_expert else (part.offsets, part.lengths)
        return TensorSlice(tuple(a + b for a, b in zip(start, self.region.offsets, strict=True)), size)


def places(name: str, shape: Sequence[int], layout: Layout | Container[str]) -> list[Place]:
    """Where the model's tensor `name` lies on disk, in a layout or among the names that a folder has.

    One place, the whole tensor under the same name, for everything but experts that are stored one by one.
    """
    match = STACKED.fullmatch(name)
    if match is None or not _one_by_one(name, match, layout):
        return [Place(name, TensorSlice.full(shape))]
    experts, rows, columns = shape
    parts = EXPERT_PARTS[match["stack"]]
    height = rows // len(parts)
    return [
        Place(
            f"{match['experts']}.{j}.{part}.weight",
            TensorSlice((j, i * height, 0), (1, height, columns)),
            one_expert=True,
        )
        for j in range(experts)
        for i, part in enumerate(parts)
    ]


def _one_by_one(name: str, match: re.Match, layout: Layout | Container[str]) -> bool:
    if isinstance(layout, str):
        return layout == "per_expert" or (layout == "hub" and name.startswith("mtp."))
    first = f"{match['experts']}.0.{EXPERT_PARTS[match['stack']][0]}.weight"
    return name not in layout and first in layout


def home(name: str, shape: Sequence[int]) -> tuple[str, Place]:
    """The inverse of `places`: the model's tensor that a tensor on disk belongs to, and its place there."""
    match = ONE_EXPERT.fullmatch(name)
    if match is None or len(shape) != 2:
        return name, Place(name, TensorSlice.full(shape))
    stack = next(stack for stack, parts in EXPERT_PARTS.items() if match["part"] in parts)
    row = EXPERT_PARTS[stack].index(match["part"]) * shape[0]
    region = TensorSlice((int(match["expert"]), row, 0), (1, *shape))
    return f"{match['experts']}.{stack}", Place(name, region, one_expert=True)


def published_dtype(name: str) -> torch.dtype:
    """The dtype that a tensor has in the published checkpoints: two kinds are F32, all else is BF16."""
    is_f32 = name.endswith((".linear_attn.A_log", ".linear_attn.norm.weight"))
    return torch.float32 if is_f32 else torch.bfloat16


def disk_spec(
    shapes: Mapping[str, Sequence[int]],
    layout: Layout = "hub",
    dtype_of: Callable[[str], torch.dtype] = published_dtype,
) -> dict[str, TensorSpec]:
    """Name on disk -> shape and dtype, for the model's parameters given as name -> shape (see `shapes_of`)."""
    return {
        place.name: TensorSpec(place.disk_shape, dtype_of(place.name))
        for name, shape in shapes.items()
        for place in places(name, shape, layout)
    }


def shapes_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """`model.named_parameters()` -> name -> shape, whole shapes where they are sharded."""
    return {name: tuple(tensor.shape) for name, tensor in parameters}


def lacks_mtp(wanted: Iterable[str], there: Iterable[str]) -> list[str]:
    """What to say, beside what is missing, of a checkpoint that has nothing of a model's multi-token prediction."""
    if not any(n.startswith("mtp.") for n in wanted) or any(n.startswith("mtp.") for n in there):
        return []
    words = "it holds no mtp.*, which transformers leaves out when it saves, and a run without model.mtp_num_layers: 1"
    return [f"{words}; start from a published checkpoint, or set model.mtp_num_layers: 0"]


def may_be_left(name: str, shapes: Collection[str]) -> bool:
    """Whether a model without a tensor may be loaded from a checkpoint that has it."""
    if name.startswith("mtp."):
        return not any(n.startswith("mtp.") for n in shapes)
    return name == HEAD and HEAD not in shapes
