"""PackedBatch: the input of a model, with the boundaries of its packed sequences.

There is one token axis T, no padding inside and no attention mask. `cu_seqlens` alone drives
attention, the causal convolution and the gated delta rule; nothing infers boundaries from
position_ids. This file knows no model: VisionSpec holds the config.json values that it needs.
"""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from kernels.host import to_device

IGNORE = -100  # label of a position that has no loss


@dataclass(frozen=True)
class PatchLayout:
    """Where each patch lies in its image: derived from grid_thw on the host, once, in the collator.

    The P patches come in order of appearance, inside an image in the order of its 2x2 merge blocks.
    """

    cu_seqlens: Tensor  # [F+1] int32 on the CPU: attention runs inside one image or video frame
    position: Tensor  # [P, 2] int64: row and column of each patch, for the 2-D rope
    corner: Tensor  # [4, P] int64: rows of the four learned position embeddings around each patch
    corner_weight: Tensor  # [4, P] fp32: their bilinear weights


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: packed sequences end to end, and the patches of their images and videos."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, already shifted: labels[t] is the target of position t; -100 = no loss
    position_ids: Tensor  # [3, T] int64: temporal, height, width
    cu_seqlens: Tensor  # [S+1] int32 on the CPU: sequence s is tokens cu_seqlens[s]:cu_seqlens[s+1]
    pixel_values: Tensor  # [P, C*2*16*16] patches of all images and video frames, in order of appearance
    grid_thw: Tensor  # [N, 3] int64 on the CPU: patches per image or video, (1 or t, h, w)
    # Derived from the above in the collator, else by the model, which costs a host sync.
    vision_index: Tensor | None = None  # [T] int64: row of the vision features that replaces token t, -1 for text
    vision_token: Tensor | None = None  # [P/4] int64, the inverse: token that each row replaces, -1 for none
    vision: PatchLayout | None = None
    label_positions: Tensor | None = None  # [L] int64: positions t with a label
    is_pad: Tensor | None = None  # [T] bool: padding tokens, left out of all statistics; None = there are none
    embedding_noise: Tensor | None = None  # [T, H] fp32, added to the embeddings of text; None = none
    pairs: Tensor | None = None  # [Q, 2] int64 on the CPU: the sequences of each pair's chosen and rejected answers
    pair_numbers: Tensor | None = None  # [Q] int64 on the CPU: the pairs' numbers among all of the data set
    reference: Tensor | None = None  # [Q, 2] fp32: log-probabilities of these answers by the reference
    bad_records: tuple[str, ...] = ()  # errors of the samples that were left out because their images are broken

    def to(self, device: torch.device | str) -> "PackedBatch":
        """A copy whose tensors are on `device`, but for those that the host reads (HOST_FIELDS)."""
        return _to(self, device)

    def pin_memory(self) -> "PackedBatch":
        """A copy in which all that `to` moves is page-locked. The DataLoader calls this."""
        return map_fields(self, Tensor.pin_memory, skip=HOST_FIELDS)


@dataclass(frozen=True)
class MTPTargets:
    """The targets of multi-token prediction, made on the host like the collator's fields.

    At position t the layer sees the hidden state of t and the token t+1; its target is the token
    t+2 of the same sequence.
    """

    labels: Tensor  # [T] int64: the label of position t+1, which is the token t+2; -100 = no loss, or another sequence
    weights: Tensor  # [T] fp32: token weights of these labels
    label_positions: Tensor  # [L] int64: positions t with a label
    is_end: Tensor  # [T] bool: the last token of a sequence, which has no next one

    def to(self, device: torch.device | str) -> "MTPTargets":
        return _to(self, device)


def mtp_labels(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The fields `labels` and `is_end` of MTPTargets, for a batch on the host."""
    is_end = torch.zeros(len(batch.labels), dtype=torch.bool)
    ends, lengths = batch.cu_seqlens[1:].long(), batch.cu_seqlens.diff()
    is_end[ends[lengths > 0] - 1] = True
    return batch.labels.roll(-1).masked_fill(is_end, IGNORE), is_end


Tensors = TypeVar("Tensors", PackedBatch, PatchLayout, MTPTargets)
HOST_FIELDS = ("cu_seqlens", "grid_thw", "pairs", "pair_numbers")


def _to(tensors: Tensors, device: torch.device | str) -> Tensors:
    return map_fields(tensors, lambda tensor: to_device(tensor, torch.device(device)), skip=HOST_FIELDS)


def map_fields(
    tensors: Tensors, change: Callable[[Any], Any], kind: type = Tensor, skip: Collection[str] = ()
) -> Tensors:
    """A copy with `change` applied to each field of type `kind`, a PatchLayout's included."""
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(tensors):
        value = getattr(tensors, f.name)
        if isinstance(value, PatchLayout):
            changed[f.name] = map_fields(value, change, kind, skip)
        elif isinstance(value, kind) and f.name not in skip:
            changed[f.name] = change(value)
    return dataclasses.replace(tensors, **changed)


@dataclass(frozen=True)
class VisionSpec:
    """The values of a model's config.json that the derived fields need."""

    image_token_id: int
    video_token_id: int
    merge_size: int = 2  # merge_size x merge_size patches become one token
    grid_side: int = 48  # the learned position embeddings form a grid_side x grid_side grid


def derive(batch: PackedBatch, spec: VisionSpec | None) -> PackedBatch:
    """Fill in vision_index, vision_token and vision, and a dummy image where there is none.

    Image tokens take the features in order. Features that no token takes belong to a dummy image:
    it makes the vision tower run in every step, whatever the data, and its gradient is exactly
    zero. Raises ValueError if there are fewer features than image tokens, or if there are images
    for a text-only model, which has no spec and needs none of the fields.
    """
    if spec is None:
        if len(batch.grid_thw):
            raise ValueError(f"{len(batch.grid_thw)} images or videos for a text-only model")
        return batch
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
    vision = _to(build_patch_layout(batch.grid_thw, spec), device)
    return dataclasses.replace(batch, vision_index=index.to(device), vision_token=token.to(device), vision=vision)


def build_patch_layout(grid_thw: Tensor, spec: VisionSpec) -> PatchLayout:
    """The PatchLayout of the images and videos in grid_thw [N, 3].

    The learned position embeddings are interpolated as by F.interpolate with mode="bilinear" and
    align_corners=True.
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
        fraction = source - low  # the weight of `high`
        for rows, row_weight in ((low[:, 0], 1 - fraction[:, 0]), (high[:, 0], fraction[:, 0])):
            for cols, col_weight in ((low[:, 1], 1 - fraction[:, 1]), (high[:, 1], fraction[:, 1])):
                corners.append((rows * side + cols).repeat(t))
                weights.append((row_weight * col_weight).repeat(t))
        positions.append(position.repeat(t, 1))
        frames += [h * w] * t
    cu_seqlens = torch.tensor([0, *frames]).cumsum(0).to(torch.int32)
    corner, weight = (torch.stack([torch.cat(parts[i::4]) for i in range(4)]) for parts in (corners, weights))
    return PatchLayout(cu_seqlens, torch.cat(positions), corner, weight)
