"""Patches, which the vision tower takes: their format by a model folder, and pixels to patches."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from qwen35.errors import SettingError

CHANNELS = 3  # every image is made RGB
MAX_SIZE = 1024  # of patch_size, temporal_patch_size, merge_size
PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil", "Qwen3VLVideoProcessor")
ONLY = {  # key -> the values that are supported, the first where it is absent
    "do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,), "do_convert_rgb": (True,), "resample": (3,),
    "min_frames": (4,), "image_processor_type": PROCESSORS, "video_processor_type": PROCESSORS,
}  # fmt: skip
# what the recipe sets instead (sizes, frames), and how transformers runs a processor
IGNORED_KEYS = """size min_pixels max_pixels fps max_frames num_frames max_video_tokens do_sample_frames processor_class
    feature_extractor_type return_metadata return_tensors data_format input_data_format device disable_grouping
    default_to_square model_input_names _processor_class _valid_processor_keys""".split()


def _is_number(value: Any) -> bool:
    """0, or of a magnitude with which fp32 pixels neither overflow nor vanish."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and (value == 0 or 1e-6 <= abs(value) <= 1e6)


Rule = tuple[Callable[[Any], bool], str]
SIZE: Rule = (lambda value: type(value) is int and 1 <= value <= MAX_SIZE, f"a whole number from 1 to {MAX_SIZE}")
SCALE: Rule = (lambda value: _is_number(value) and value > 0, "a number from 1e-6 to 1e6")
RGB: Rule = (
    lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)),
    "a list of three numbers, 0 or from 1e-6 to 1e6",
)
VALUES = {  # key -> its rule
    "patch_size": SIZE, "temporal_patch_size": SIZE, "merge_size": SIZE, "image_mean": RGB, "image_std": RGB,
    "rescale_factor": SCALE,
}  # fmt: skip


@dataclass(frozen=True)
class PatchFormat:
    """What transformers' image and video processors have in common."""

    patch: int  # pixels a side
    temporal_patch: int  # frames
    merge: int  # patches a side that become one token
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float  # multiplies pixels of 0..255, before mean and std

    @classmethod
    def of(cls, config: dict[str, Any], path: str) -> "PatchFormat":
        """By a processor's config; `path` names it in messages. Raises SettingError."""
        for key, supported in ONLY.items():
            if (value := config.get(key, supported[0])) not in supported:
                only = ", ".join(map(json.dumps, supported))
                raise SettingError(f"{path}: {key}: {json.dumps(value)[:80]} is not supported, only {only}")
        known = {*ONLY, *VALUES, *IGNORED_KEYS}
        for key in [key for key, value in config.items() if key not in known and value not in (None, False)]:
            raise SettingError(f"{path}: {key[:80]}: is unknown and may change the pixels; remove it if it does not")
        values = {"rescale_factor": 1 / 255, **config}
        for key, (is_valid, what) in VALUES.items():
            if key not in values:
                raise SettingError(f"{path}: has no {key}")
            if not is_valid(values[key]):
                raise SettingError(f"{path}: {key}: {str(values[key])[:80]} is not {what}")
        if not all(values["image_std"]):
            raise SettingError(f"{path}: image_std: {values['image_std']} has a 0, and pixels are divided by it")
        patch, temporal_patch, merge, mean, std, scale = (values[key] for key in VALUES)
        return PatchFormat(patch, temporal_patch, merge, tuple(mean), tuple(std), scale)

    @property
    def patch_dim(self) -> int:
        """Values in a patch: CHANNELS * temporal_patch * patch * patch."""
        return CHANNELS * self.temporal_patch * self.patch**2

    def fitted(
        self, height: int, width: int, least: int, most: int, count: int = 1, frames: int = 1
    ) -> tuple[int, int]:
        """(height, width), multiples of a token's side, of `least` to `most` pixels in all frames.

        As in transformers, `count` frames are counted as `frames`, filled up to pairs, at first.
        """
        side = self.patch * self.merge
        new_height, new_width = round(height / side) * side, round(width / side) * side
        if frames * new_height * new_width > most:
            shrink = math.sqrt(count * height * width / most)
            new_height = max(side, math.floor(height / shrink / side) * side)
            new_width = max(side, math.floor(width / shrink / side) * side)
        elif frames * new_height * new_width < least:
            grow = math.sqrt(least / (count * height * width))
            new_height = math.ceil(height * grow / side) * side
            new_width = math.ceil(width * grow / side) * side
        return new_height, new_width

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens of an image or video of (1 or t, h, w) patches."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def picture(self, patches: Tensor, grid: Sequence[int]) -> np.ndarray:
        """Patches [P, patch_dim] of a grid (t, h, w) -> its first frame [H, W, 3] uint8."""
        layout = "(t row column a b) (rgb d h w) -> t d (row a h) (column b w) rgb"
        sizes = {"t": grid[0], "row": grid[1] // self.merge, "column": grid[2] // self.merge, "a": self.merge}
        values = rearrange(
            patches.numpy(),
            layout,
            **sizes,
            b=self.merge,
            rgb=CHANNELS,
            d=self.temporal_patch,
            h=self.patch,
            w=self.patch,
        )[0, 0]
        pixels = (values * np.array(self.std) + np.array(self.mean)) / self.scale
        return pixels.round().clip(0, 255).astype(np.uint8)


class Normalizer:
    """Pixels 0..255 -> (levels[pixel] - mean) / std, exactly so in fp32."""

    def __init__(self, levels: np.ndarray, divisor: float, mean: np.ndarray, std: np.ndarray):
        """levels [256], mean [3], std [3], fp32; divisor: of pixels, if that gives the levels."""
        self._levels, self._divisor = levels, np.float32(divisor)
        # faster than to look the levels up
        self._divides = np.array_equal(np.arange(256, dtype=np.float32) / self._divisor, levels)
        self._mean, self._std = (v[0] if len(set(v.tolist())) == 1 else v[:, None] for v in (mean, std))

    @classmethod
    def of_images(cls, scale: float, mean: Sequence[float], std: Sequence[float]) -> "Normalizer":
        """As transformers' PIL image processors: scaled in fp64, rounded to fp32, normalised."""
        levels = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
        return cls(levels, round(1 / scale) or 1, np.array(mean, np.float32), np.array(std, np.float32))

    @classmethod
    def of_videos(cls, scale: float, mean: Sequence[float], std: Sequence[float]) -> "Normalizer":
        """As transformers' video processors: the scale goes into mean and std, all in fp32."""
        means, stds = (np.array(values, np.float32) * np.float32(1 / scale) for values in (mean, std))
        return cls(np.arange(256, dtype=np.float32), 1, means, stds)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """[N, 3, K] uint8 -> fp32."""
        values = pixels.astype(np.float32) if self._divides else self._levels[pixels]
        if self._divides and self._divisor != 1:
            values /= self._divisor
        values -= self._mean
        values /= self._std
        return values


def to_patches(frames: np.ndarray, patch: int, merge: int, temporal: int, normalizer: Normalizer) -> Tensor:
    """frames [T, H, W, 3] uint8 -> patches [P, 3 * temporal * patch * patch] fp32.

    T is 1 (an image, which each patch holds `temporal` times) or a multiple of `temporal`; H and W
    are multiples of patch * merge. The patches of a frame come in blocks of merge x merge
    neighbours, row by row of blocks.
    """
    depth = 1 if len(frames) == 1 else temporal
    layout = "(t d) (row a h) (column b w) rgb -> (t row column a b) rgb (d h w)"
    values = normalizer(rearrange(frames, layout, d=depth, a=merge, h=patch, b=merge, w=patch))
    if depth != temporal:
        values = np.repeat(values[:, :, None], temporal, axis=2)
    return torch.from_numpy(values.reshape(len(values), -1))
