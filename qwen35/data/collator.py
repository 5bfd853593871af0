"""Collates samples: packed sequences of exactly cutoff_len tokens, patches in buckets.

Also checks that model, tokenizer and processors fit each other before any batch is made.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwen35.batch import IGNORE, PackedBatch, VisionSpec, derive
from qwen35.config.layout import text_section
from qwen35.data.dataset import Sample
from qwen35.data.files import is_text_only, read_config, read_processor
from qwen35.data.image_processor import CONFIG, ImageError
from qwen35.data.mrope import position_ids
from qwen35.data.patches import CHANNELS
from qwen35.data.preparation import Preparation
from qwen35.data.record import Record
from qwen35.data.template import IMAGE_PAD, VIDEO_PAD
from qwen35.data.video_processor import VIDEO_CONFIG
from qwen35.errors import SettingError


def vision_spec(folder: str | Path) -> VisionSpec | None:
    """The VisionSpec of a model folder's config.json; None: text-only. Raises SettingError."""
    if is_text_only(folder):
        return None
    config = read_config(folder, "config.json")
    where, vision = f"{folder}/config.json", config.get("vision_config")
    if not isinstance(vision, dict):
        raise SettingError(f"{where}: has no vision_config; is it a Qwen3.5 model?")
    side = math.isqrt(_number(vision, "num_position_embeddings", where))  # of their square grid
    image, video = (_number(config, name, where) for name in ("image_token_id", "video_token_id"))
    return VisionSpec(image, video, _number(vision, "spatial_merge_size", where), side)


def _number(values: dict[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = values.get(name, default)
    if value is None:
        raise SettingError(f"{where}: has no {name}; is it a Qwen3.5 model?")
    if type(value) is not int or value < 0:
        raise SettingError(f"{where}: {name}: {str(value)[:80]} is not a whole number")
    return value


def check_agreement(
    folder: str | Path, tokenizer_dir: str | Path, preparation: Preparation, spec: VisionSpec | None
) -> None:
    """Raises SettingError if the model does not fit the tokenizer and processors."""
    tokenizer = preparation.tokenizer
    config, where = read_config(folder, "config.json"), f"{folder}/config.json"
    for token, ours, name in (
        (IMAGE_PAD, tokenizer.image_id, "image_token_id"),
        (VIDEO_PAD, tokenizer.video_id, "video_token_id"),
    ):
        theirs = getattr(spec, name, ours)  # a text-only model names none
        if ours not in (None, theirs):
            raise SettingError(
                f"{token} is token {ours} in {tokenizer_dir}/tokenizer.json, but {name} is {theirs} in {where}"
            )
    token, last = tokenizer.last()
    text = {} if (found := text_section(config)) is None else found
    if not isinstance(text, dict):
        raise SettingError(f"{where}: text_config: {str(text)[:80]} is not an object")
    vocab_size = _number(text, "vocab_size", where, last + 1)
    if last >= vocab_size:
        raise SettingError(
            f"{token} is token {last} in {tokenizer_dir}/tokenizer.json, but vocab_size is {vocab_size} in {where}"
        )
    if preparation.images is None or preparation.videos is None:
        return
    vision = config["vision_config"]
    for processor, names in ((preparation.images, CONFIG), (preparation.videos, VIDEO_CONFIG)):
        _, source = read_processor(tokenizer_dir, *names)
        for name, model_name, ours in (
            ("merge_size", "spatial_merge_size", processor.merge),
            ("patch_size", "patch_size", processor.patch),
            ("temporal_patch_size", "temporal_patch_size", processor.temporal_patch),
        ):
            theirs = _number(vision, model_name, where, ours)
            if ours != theirs:
                raise SettingError(f"{name} is {ours} in {source}, but {model_name} is {theirs} in {where}")
    channels = _number(vision, "in_channels", where, CHANNELS)
    if channels != CHANNELS:
        raise SettingError(f"in_channels is {channels} in {where}, but images are read as RGB")


def check_patch_bucket(patch_bucket: int, spec: VisionSpec | None) -> None:
    """Raises SettingError if a bucket does not hold whole blocks of merged patches."""
    if spec is None:
        return
    block = spec.merge_size**2
    if patch_bucket < block or patch_bucket % block:
        name = "data.dataloader_param.patch_bucket"
        raise SettingError(f"{name}: {patch_bucket} must be a multiple of {block}, at least {block}")


def collate(
    packed: Sequence[Sequence[Sample]],
    cutoff_len: int,
    pad_id: int,
    patch_bucket: int,
    spec: VisionSpec | None,
    patch_dim: int | None = None,
    has_pairs: bool = False,
) -> PackedBatch:
    """Packed sequences -> a batch of T = len(packed) * cutoff_len tokens, with all derived fields.

    Each packed sequence is filled up by a sequence of pad tokens: no labels, positions from 0,
    `is_pad` set. The patches are filled up to a multiple of patch_bucket by a dummy image of zeros,
    to which no token refers; for a text-only model there are none. patch_dim: needed if the first
    packed sequence is empty. has_pairs: the samples are neighbours, the sides of preference pairs.
    """
    samples: list[Sample] = []
    pads: list[bool] = []
    for sequence in packed:
        samples += sequence
        pads += [False] * len(sequence)
        left = cutoff_len - sum(len(s.input_ids) for s in sequence)
        if left < 0:
            raise ValueError(f"a packed sequence has {cutoff_len - left} tokens, but cutoff_len is {cutoff_len}")
        if left:
            width = samples[0].pixel_values.shape[1] if patch_dim is None else patch_dim
            samples.append(_pad_sequence(left, pad_id, width))
            pads.append(True)
    lengths = torch.tensor([len(s.input_ids) for s in samples])
    pixels = [s.pixel_values for s in samples]
    grids = [s.grid_thw for s in samples]
    patches = sum(len(p) for p in pixels)
    fill = -patches % patch_bucket if patches else patch_bucket
    if spec and fill:
        pixels.append(torch.zeros(fill, pixels[0].shape[1]))
        grids.append(torch.tensor([[1, spec.merge_size, fill // spec.merge_size]]))
    labels = torch.cat([s.labels for s in samples])
    batch = PackedBatch(
        input_ids=torch.cat([s.input_ids for s in samples]),
        labels=labels,
        position_ids=torch.cat([s.position_ids for s in samples], dim=1),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32),
        pixel_values=torch.cat(pixels),
        grid_thw=torch.cat(grids),
        label_positions=(labels != IGNORE).nonzero().squeeze(1),
        is_pad=torch.repeat_interleave(torch.tensor(pads), lengths),
    )
    if has_pairs:
        sides = [(row, sample.pair) for row, sample in enumerate(samples) if sample.pair is not None]
        rows, numbers = torch.tensor(sides, dtype=torch.int64).reshape(-1, 2, 2).unbind(-1)
        batch = replace(batch, pairs=rows.contiguous(), pair_numbers=numbers[:, 0].contiguous())
    return derive(batch, spec)


def _pad_sequence(length: int, pad_id: int, patch_dim: int) -> Sample:
    return Sample(
        torch.full((length,), pad_id),
        torch.full((length,), IGNORE),
        torch.arange(length).expand(3, -1),
        torch.zeros(0, patch_dim),
        torch.zeros(0, 3, dtype=torch.int64),
    )


def prompt_batch(record: Record, preparation: Preparation, spec: VisionSpec | None, thinking: bool) -> PackedBatch:
    """A sequence that ends where the model answers, for generation: without labels and padding.

    A last assistant turn is left out. thinking: as for `prompt_pieces`. Raises RecordError.
    """
    grids, extents = preparation.measure(record)
    pieces = preparation.prompt(record, thinking)
    ids, _ = preparation.tokenizer.encode(pieces, extents)
    pixels = []
    for visual in record.visuals:
        try:
            pixels.append(preparation.patches(visual)[0])
        except ImageError as error:
            raise record.error(f"{visual}: {error}") from None
    sample = Sample(
        torch.from_numpy(ids).long(),
        torch.full((len(ids),), IGNORE),
        torch.from_numpy(position_ids(ids, grids, spec)),
        torch.cat([torch.zeros(0, preparation.patch_dim), *pixels]),
        torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
    )
    bucket = spec.merge_size**2 if spec else 1
    return replace(collate([[sample]], len(ids), preparation.tokenizer.pad_id, bucket, spec), is_pad=None)
