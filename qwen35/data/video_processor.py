"""Videos as patches: what transformers' Qwen3-VL video processor makes of them, bit for bit on the same machine.

Frames are sampled evenly, all scaled alike to sides of multiples of 32 pixels, and seen two at a time (temporal_patch): such
a pair is a run of tokens of its own, with its time before it.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35.config.schema import PreprocessParameters
from qwen35.data.files import read_processor
from qwen35.data.image_processor import CONFIG, MAX_SIDES_RATIO
from qwen35.data.patches import Levels, PatchFormat, cut
from qwen35.data.record import Video
from qwen35.data.video_frames import Reel, VideoError, decode, reel

VIDEO_CONFIG = ("video_processor", "video_preprocessor_config.json", CONFIG[1])
FEWEST = 4  # frames that are taken, where there are as many


@dataclass(frozen=True)
class Clip:
    """A video as it is seen: which frames, how large, and when."""

    numbers: list[int]  # of the frames, from 0
    grid: tuple[int, int, int]  # patches: (pairs of frames, height, width)
    seconds: list[float]  # of each pair: half-way between its first and last frame


@dataclass(frozen=True)
class VideoProcessor(PatchFormat):
    fps: float
    most_frames: int
    min_pixels: int  # of one frame, on average
    max_pixels: int

    @classmethod
    def from_folder(cls, folder: str | Path, settings: PreprocessParameters) -> "VideoProcessor":
        """By a model folder's video processor, else by the images' own file. Raises SettingError."""
        format_ = PatchFormat.of(*read_processor(folder, *VIDEO_CONFIG))
        return cls(
            **vars(format_),
            fps=settings.video_fps,
            most_frames=settings.video_maxlen,
            min_pixels=settings.video_min_pixels,
            max_pixels=settings.video_max_pixels,
        )

    def clip(self, video: Video) -> Clip:
        """From the headers alone: nothing is decoded. Raises ImageError, SettingError where PyAV is missing."""
        found = reel(video)
        if found.count < self.temporal_patch:
            raise VideoError(
                f"has {found.count} frame{'s' * (found.count != 1)}, fewer than {self.temporal_patch}",
                "video too short",
            )
        numbers, fps = self._sampled(found)
        height, width = self._resized(len(numbers), found.height, found.width)
        full = numbers + numbers[-1:] * (-len(numbers) % self.temporal_patch)
        step = self.temporal_patch
        seconds = [(full[i] / fps + full[i + step - 1] / fps) / 2 for i in range(0, len(full), step)]
        return Clip(numbers, (len(full) // step, height // self.patch, width // self.patch), seconds)

    def patches(self, video: Video) -> tuple[Tensor, tuple[int, int, int]]:
        """pixels [P, 3 * temporal_patch * patch * patch] fp32 and the grid (t, h, w), P = t * h * w. Raises as `clip`."""
        clip = self.clip(video)
        t, h, w = clip.grid
        size = (h * self.patch, w * self.patch)
        frames = [_scaled(frame, size) for frame in decode(video, clip.numbers)]
        frames += frames[-1:] * (t * self.temporal_patch - len(frames))
        return cut(np.stack(frames), self.patch, self.merge, self.temporal_patch, self.levels), clip.grid

    @cached_property
    def levels(self) -> Levels:
        return Levels.of_videos(self.scale, self.mean, self.std)

    def _sampled(self, found: Reel) -> tuple[list[int], float]:
        """Numbers of the frames that are taken, and how many a second the video has."""
        if found.fps is None:
            count = min(found.count, self.most_frames)
        else:
            count = min(max(int(found.count / found.fps * self.fps), FEWEST), self.most_frames, found.count)
        numbers = np.linspace(0, found.count - 1, count).round().astype(int)
        return numbers.tolist(), self.fps if found.fps is None else found.fps

    def _resized(self, count: int, height: int, width: int) -> tuple[int, int]:
        """Both sides multiples of a token's side; the limits are of all `count` frames together."""
        side = self.patch * self.merge
        least, most = self.min_pixels * count, self.max_pixels * count
        if height < side or width < side:
            grow = max(side / height, side / width)
            height, width = int(height * grow), int(width * grow)
        if max(height, width) > MAX_SIDES_RATIO * min(height, width):
            raise VideoError(f"is {width} x {height} pixels, one side more than {MAX_SIDES_RATIO} times the other")
        new_height, new_width = round(height / side) * side, round(width / side) * side
        frames = round(count / self.temporal_patch) * self.temporal_patch
        if frames * new_height * new_width > most:
            shrink = math.sqrt(count * height * width / most)
            new_height = max(side, math.floor(height / shrink / side) * side)
            new_width = max(side, math.floor(width / shrink / side) * side)
        elif frames * new_height * new_width < least:
            grow = math.sqrt(least / (count * height * width))
            new_height = math.ceil(height * grow / side) * side
            new_width = math.ceil(width * grow / side) * side
        return new_height, new_width


def _scaled(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8 -> size: as torchvision resizes a frame on the host."""
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None]
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()
