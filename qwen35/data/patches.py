"""Pixels as the patches that the vision tower takes: levels 0..255 to numbers, and the cut into squares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from qwen35.errors import SettingError

CHANNELS = 3  # of every image, made RGB


LARGEST = 1024  # of a patch's sizes
KINDS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil", "Qwen3VLVideoProcessor")
READ = """do_resize do_rescale do_normalize do_convert_rgb resample min_frames image_processor_type video_processor_type
    patch_size temporal_patch_size merge_size image_mean image_std rescale_factor""".split()
# what the recipe says instead (sizes, frames), and how transformers runs a processor
WITHOUT_EFFECT = """size min_pixels max_pixels fps max_frames num_frames max_video_tokens do_sample_frames processor_class
    feature_extractor_type return_metadata return_tensors data_format input_data_format device disable_grouping
    default_to_square model_input_names _processor_class _valid_processor_keys""".split()


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _is_number(value: Any) -> bool:
    """Within what fp32 computes with: beyond it the pixels would all be infinite, or nothing."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and (value == 0 or 1e-6 <= abs(value) <= 1e6)


def _is_scale(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rgb(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _entry(config: dict[str, Any], key: str, path: str, holds: Callable[[Any], bool], what: str) -> Any:
    if key not in config:
        raise SettingError(f"{path}: has no {key}")
    if not holds(config[key]):
        raise SettingError(f"{path}: {key}: {str(config[key])[:80]} is not {what}")
    return config[key]


@dataclass(frozen=True)
class PatchFormat:
    patch: int
    temporal_patch: int
    merge: int  # patches a side that become one token
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float  # of a pixel's 0..255 before mean and std

    @classmethod
    def of(cls, config: dict[str, Any], path: str) -> "PatchFormat":
        """By the processor's config in a model folder; `path` says where that stands. Raises SettingError."""
        for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not config.get(key, True):
                raise SettingError(f"{path}: {key}: false is not supported")
        for key, only, name in (("resample", Image.Resampling.BICUBIC, "3 (bicubic)"), ("min_frames", 4, "4")):
            if config.get(key, only) != only:
                raise SettingError(f"{path}: {key}: {str(config[key])[:80]} is not supported, only {name}")
        for key in ("image_processor_type", "video_processor_type"):
            if config.get(key, KINDS[0]) not in KINDS:
                raise SettingError(
                    f"{path}: {key}: {str(config[key])[:80]} is not supported, only {' and '.join(KINDS[::3])}"
                )
        known = {*READ, *WITHOUT_EFFECT}
        for key in [key for key, value in config.items() if key not in known and value not in (None, False)]:
            raise SettingError(
                f"{path}: {key[:80]}: not known, and it may change what images become; take it out if it does not"
            )
        patch, temporal_patch, merge = (
            _entry(config, key, path, _is_size, f"a whole number from 1 to {LARGEST}")
            for key in ("patch_size", "temporal_patch_size", "merge_size")
        )
        mean, std = (
            _entry(config, key, path, _is_rgb, "a list of three numbers, 0 or from 1e-6 to 1e6")
            for key in ("image_mean", "image_std")
        )
        if not all(std):
            raise SettingError(f"{path}: image_std: {std} has a 0, and pixels are divided by it")
        scale = _entry(
            {"rescale_factor": 1 / 255, **config}, "rescale_factor", path, _is_scale, "a number from 1e-6 to 1e6"
        )
        return PatchFormat(patch, temporal_patch, merge, tuple(mean), tuple(std), scale)

    @property
    def values(self) -> int:
        """Numbers in one patch."""
        return CHANNELS * self.temporal_patch * self.patch**2

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2] // self.merge**2


@dataclass(frozen=True)
class Levels:
    """What becomes of each of the 256 levels of a channel.

    Computed where (level / divisor - minus) / by gives the very numbers of `table`, which is five times as fast as looking up.
    """

    table: np.ndarray  # [3, 256] fp32
    steps: tuple[
        np.ndarray, np.ndarray, np.ndarray
    ]  # divisor, minus, by: [3, 1] fp32, or [] where alike for all channels

    @classmethod
    def of_images(cls, scale: float, mean: Sequence[float], std: Sequence[float]) -> "Levels":
        """Scaled in fp64, rounded to fp32, then normalised: the order of transformers' PIL image processors."""
        scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
        minus, by = np.array(mean, np.float32)[:, None], np.array(std, np.float32)[:, None]
        divisor = np.float32(round(1 / scale) or 1)
        return cls((scaled - minus) / by, (np.asarray(divisor), _one(minus), _one(by)))

    @classmethod
    def of_videos(cls, scale: float, mean: Sequence[float], std: Sequence[float]) -> "Levels":
        """Scale, mean and std in one, in fp32: as transformers' video processors do it."""
        minus, by = (np.array(values, np.float32)[:, None] * np.float32(1 / scale) for values in (mean, std))
        table = (np.arange(256, dtype=np.float32) - minus) / by
        return cls(table, (np.asarray(np.float32(1)), _one(minus), _one(by)))

    @cached_property
    def is_computed(self) -> bool:
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8), self.table.shape)
        return np.array_equal(self._computed(levels), self.table)

    def _computed(self, levels: np.ndarray) -> np.ndarray:
        divisor, minus, by = self.steps
        values = levels.astype(np.float32)
        if divisor != 1:
            values /= divisor
        values -= minus
        values /= by
        return values

    def __call__(self, levels: np.ndarray) -> np.ndarray:
        """[N, 3, K] uint8 -> fp32."""
        if self.is_computed:
            return self._computed(levels)
        return np.stack([np.take(self.table[c], levels[:, c], mode="clip") for c in range(CHANNELS)], axis=1)


def _one(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.flat[0]) if (values == values.flat[0]).all() else values


def cut(frames: np.ndarray, patch: int, merge: int, temporal: int, levels: Levels) -> Tensor:
    """frames [T, H, W, 3] uint8, sides multiples of patch * merge -> [P, 3 * temporal * patch * patch] fp32.

    T is 1 (an image: each patch holds it `temporal` times) or a multiple of `temporal`. Patches of a frame come in blocks of
    merge x merge neighbours, a block after the other along the rows.
    """
    depth = 1 if len(frames) == 1 else temporal
    layout = "(t d) (row a h) (column b w) rgb -> (t row column a b) rgb (d h w)"
    values = levels(rearrange(frames, layout, d=depth, a=merge, h=patch, b=merge, w=patch))
    if depth != temporal:
        values = np.repeat(values[:, :, None], temporal, axis=2)
    return torch.from_numpy(values.reshape(len(values), -1))
