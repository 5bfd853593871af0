"""PackedBatch: the one object that says where sequences start and end.

One token axis T, no padding inside, no attention mask. `cu_seqlens` alone drives attention, the causal convolution and the
gated delta rule; nobody infers boundaries from position_ids.
"""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from kernels.host import to_device

IGNORE = -100  # label of a position that is not trained


@dataclass(frozen=True)
class VisionIndex:
    """What the vision tower derives from grid_thw: host work, made once in the collator.

    P patches in order of appearance, inside an image in the order of its 2x2 merge blocks.
    """

    cu_seqlens: Tensor  # [F+1] int32 on the CPU: attention runs inside one image or video frame
    position: Tensor  # [P, 2] int64 row and column of each patch, for the 2-D rope
    corner: Tensor  # [4, P] int64 the four learned positions around each patch
    corner_weight: Tensor  # [4, P] fp32 their bilinear weights


@dataclass(frozen=True)
class PackedBatch:
    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, already shifted: labels[t] is the target of position t; -100 = not trained
    position_ids: Tensor  # [3, T] int64: temporal, height, width
    cu_seqlens: Tensor  # [S+1] int32 on the CPU: sequence s is tokens cu_seqlens[s]:cu_seqlens[s+1]
    pixel_values: Tensor  # [P, C*2*16*16] patches of all images and video frames, in order of appearance
    grid_thw: Tensor  # [N, 3] int64 on the CPU: patches per image or video, (1 or t, h, w)
    # What follows from these. Made in the collator, else by the model on the way (which costs a host sync).
    vision_index: Tensor | None = None  # [T] int64: row of the vision features that replaces token t, -1 for text
    vision_token: Tensor | None = (
        None  # [P/4] int64, the inverse: token that each row of the features replaces, -1 for none
    )
    vision: VisionIndex | None = None
    trained: Tensor | None = None  # [N] int64: the tokens with a label, where the loss looks
    is_pad: Tensor | None = None  # [T] bool: tokens of the pad tails, which no statistic counts; None = there are none
    bad_records: tuple[str, ...] = ()  # what is wrong with the samples that are missing: their images are broken

    def to(self, device: torch.device | str) -> "PackedBatch":
        """A copy whose tensors are on `device`; those that the host reads (cu_seqlens, grid_thw) stay on the CPU."""
        return _to(self, device)

    def pin_memory(self) -> "PackedBatch":
        """A copy on the host whose tensors an accelerator takes without the host's help: page-locked, all that `to` moves.

        The DataLoader knows this name.
        """
        return each(self, Tensor.pin_memory, but=HOST_FIELDS)


@dataclass(frozen=True)
class MTPTargets:
    """What multi-token prediction learns, position by position: host work, as that of the collator.

    At position t it sees the hidden state of t and the token t+1, and its target is t+2, all of one sequence.
    """

    labels: Tensor  # [T] int64: the label of position t+1, which is the token t+2; -100 = not trained, or another sequence's
    weights: Tensor  # [T] fp32: token weights of these labels
    trained: Tensor  # [N] int64: the positions with a label
    is_end: Tensor  # [T] bool: the last token of a sequence, which has no next one

    def to(self, device: torch.device | str) -> "MTPTargets":
        return _to(self, device)


def mtp_labels(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Of a batch on the host: `labels` and `is_end` of MTPTargets."""
    is_end = torch.zeros(len(batch.labels), dtype=torch.bool)
    ends, lengths = batch.cu_seqlens[1:].long(), batch.cu_seqlens.diff()
    is_end[ends[lengths > 0] - 1] = True
    return batch.labels.roll(-1).masked_fill(is_end, IGNORE), is_end


Record = TypeVar("Record", PackedBatch, VisionIndex, MTPTargets)
HOST_FIELDS = ("cu_seqlens", "grid_thw")


def _to(record: Record, device: torch.device | str) -> Record:
    return each(record, lambda tensor: to_device(tensor, torch.device(device)), but=HOST_FIELDS)


def each(record: Record, change: Callable[[Any], Any], of: type = Tensor, but: Collection[str] = ()) -> Record:
    """A copy with what `change` makes of each field that is `of` a type (`but` of these names), VisionIndex's too."""
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        if isinstance(value, VisionIndex):
            changed[f.name] = each(value, change, of, but)
        elif isinstance(value, of) and f.name not in but:
            changed[f.name] = change(value)
    return dataclasses.replace(record, **changed)


@dataclass(frozen=True)
class VisionSpec:
    """The numbers of a model's config.json that the derived fields need."""

    image_token_id: int
    video_token_id: int
    merge_size: int = 2  # patches a side that become one token
    grid_side: int = 48  # learned positions a side


def derive(batch: PackedBatch, spec: VisionSpec) -> PackedBatch:
    """Fill in `vision_index`, `vision_token` and `vision` where they are absent, and a dummy image where there is none at all.

    Image tokens take the features in order. Features beyond those that the tokens ask for belong to a dummy, replace
    nothing and get a gradient of exactly zero: the vision tower runs in every step, whatever the data.
    Raises ValueError if there are fewer features than image tokens.
    """
    if batch.vision is not None and batch.vision_index is not None:
        return batch
    if len(batch.grid_thw) == 0:
        side = spec.merge_size
        pixels = batch.pixel_values.new_zeros(side**2, batch.pixel_values.shape[1])
        batch = dataclasses.replace(batch, pixel_values=pixels, grid_thw=torch.tensor([[1, side, side]]))
    ids = batch.input_ids.cpu()
    is_vision = (ids == spec.image_token_id) | (ids == spec.video_token_id)
    features = int(batch.grid_thw.prod(-1).sum()) // spec.merge_size**2
    tokens = int(is_vision.sum())
    if tokens > features:
        raise ValueError(f"{tokens} image tokens in input_ids, but grid_thw gives only {features} features")
    index = torch.where(is_vision, is_vision.cumsum(0) - 1, -1)
    token = torch.full((features,), -1)
    token[:tokens] = is_vision.nonzero().squeeze(1)
    device = batch.input_ids.device
    vision = _to(build_vision_index(batch.grid_thw, spec), device)
    return dataclasses.replace(batch, vision_index=index.to(device), vision_token=token.to(device), vision=vision)


def build_vision_index(grid_thw: Tensor, spec: VisionSpec) -> VisionIndex:
    """grid_thw [N, 3] -> where each patch lies, and between which learned positions.

    The learned grid is stretched over each image corner to corner (as interpolate's bilinear mode with align_corners).
    """
    frames, positions, corners, weights = [], [], [], []
    side, merge = spec.grid_side, spec.merge_size
    for t, h, w in grid_thw.tolist():
        row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        # [h, w, 2] -> patches in the order of their merge x merge blocks
        blocks = "(h a) (w b) yx -> (h w a b) yx"
        position = rearrange(torch.stack([row, col], dim=-1), blocks, a=merge, b=merge)
        extent = torch.tensor([h, w])
        source = position.float() * (side - 1) / (extent - 1).clamp(min=1)
        low = source.floor().long()
        high = (low + 1).clamp(max=side - 1)
        share = source - low  # of the higher neighbour
        for rows, row_weight in ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0])):
            for cols, col_weight in ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1])):
                corners.append((rows * side + cols).repeat(t))
                weights.append((row_weight * col_weight).repeat(t))
        positions.append(position.repeat(t, 1))
        frames += [h * w] * t
    cu_seqlens = torch.tensor([0, *frames]).cumsum(0).to(torch.int32)
    four = [torch.cat(corners[i::4]) for i in range(4)], [torch.cat(weights[i::4]) for i in range(4)]
    return VisionIndex(cu_seqlens, torch.cat(positions), torch.stack(four[0]), torch.stack(four[1]))
