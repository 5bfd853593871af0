"""Patches, which the vision tower takes: their format by a model folder, and pixels to patches."""

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

CHANNELS = 3  # every image is made RGB
MAX_SIZE = 1024  # of patch_size, temporal_patch_size, merge_size
PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil", "Qwen3VLVideoProcessor")
READ_KEYS = """do_resize do_rescale do_normalize do_convert_rgb resample min_frames image_processor_type video_processor_type
    patch_size temporal_patch_size merge_size image_mean image_std rescale_factor""".split()
# what the recipe sets instead (sizes, frames), and how transformers runs a processor
IGNORED_KEYS = """size min_pixels max_pixels fps max_frames num_frames max_video_tokens do_sample_frames processor_class
    feature_extractor_type return_metadata return_tensors data_format input_data_format device disable_grouping
    default_to_square model_input_names _processor_class _valid_processor_keys""".split()


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIZE


def _is_number(value: Any) -> bool:
    """0, or of a magnitude with which fp32 pixels neither overflow nor vanish."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and (value == 0 or 1e-6 <= abs(value) <= 1e6)


def _is_scale(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rgb(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _entry(config: dict[str, Any], key: str, path: str, is_valid: Callable[[Any], bool], what: str) -> Any:
    if key not in config:
        raise SettingError(f"{path}: has no {key}")
    if not is_valid(config[key]):
        raise SettingError(f"{path}: {key}: {str(config[key])[:80]} is not {what}")
    return config[key]


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
        for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not config.get(key, True):
                raise SettingError(f"{path}: {key}: false is not supported")
        for key, only, name in (("resample", Image.Resampling.BICUBIC, "3 (bicubic)"), ("min_frames", 4, "4")):
            if config.get(key, only) != only:
                raise SettingError(f"{path}: {key}: {str(config[key])[:80]} is not supported, only {name}")
        for key in ("image_processor_type", "video_processor_type"):
            if config.get(key, PROCESSORS[0]) not in PROCESSORS:
                raise SettingError(
                    f"{path}: {key}: {str(config[key])[:80]} is not supported, only {' and '.join(PROCESSORS[::3])}"
                )
        known = {*READ_KEYS, *IGNORED_KEYS}
        for key in [key for key, value in config.items() if key not in known and value not in (None, False)]:
            raise SettingError(f"{path}: {key[:80]}: is unknown and may change the pixels; remove it if it does not")
        patch, temporal_patch, merge = (
            _entry(config, key, path, _is_size, f"a whole number from 1 to {MAX_SIZE}")
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
    def patch_dim(self) -> int:
        """Values in a patch: CHANNELS * temporal_patch * patch * patch."""
        return CHANNELS * self.temporal_patch * self.patch**2

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens of an image or video of (1 or t, h, w) patches."""
        return grid[0] * grid[1] * grid[2] // self.merge**2


@dataclass(frozen=True)
class Normalizer:
    """Scales and normalises pixels: `table` has the exact value of each of a channel's 256 levels.

    Arithmetic with `terms` is five times as fast; it is used if it gives exactly `table`.
    """

    table: np.ndarray  # [3, 256] fp32
    terms: tuple[
        np.ndarray, np.ndarray, np.ndarray
    ]  # divisor, mean, std: fp32, [3, 1], or [] if alike for all channels

    @classmethod
    def of_images(cls, scale: float, mean: Sequence[float], std: Sequence[float]) -> "Normalizer":
        """As transformers' PIL image processors: scaled in fp64, rounded to fp32, normalised."""
        scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
        means, stds = np.array(mean, np.float32)[:, None], np.array(std, np.float32)[:, None]
        divisor = np.float32(round(1 / scale) or 1)
        return cls((scaled - means) / stds, (np.asarray(divisor), _scalar_if_equal(means), _scalar_if_equal(stds)))

    @classmethod
    def of_videos(cls, scale: float, mean: Sequence[float], std: Sequence[float]) -> "Normalizer":
        """As transformers' video processors: the scale goes into mean and std, all in fp32."""
        means, stds = (np.array(values, np.float32)[:, None] * np.float32(1 / scale) for values in (mean, std))
        table = (np.arange(256, dtype=np.float32) - means) / stds
        return cls(table, (np.asarray(np.float32(1)), _scalar_if_equal(means), _scalar_if_equal(stds)))

    @cached_property
    def is_computed(self) -> bool:
        """Whether the arithmetic gives exactly `table`."""
        pixels = np.broadcast_to(np.arange(256, dtype=np.uint8), self.table.shape)
        return np.array_equal(self._computed(pixels), self.table)

    def _computed(self, pixels: np.ndarray) -> np.ndarray:
        divisor, mean, std = self.terms
        values = pixels.astype(np.float32)
        if divisor != 1:
            values /= divisor
        values -= mean
        values /= std
        return values

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """[N, 3, K] uint8 -> fp32."""
        if self.is_computed:
            return self._computed(pixels)
        return np.stack([np.take(self.table[c], pixels[:, c], mode="clip") for c in range(CHANNELS)], axis=1)


def _scalar_if_equal(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.flat[0]) if (values == values.flat[0]).all() else values


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
