"""Videos to patches, bit for bit as transformers' Qwen3-VL video processor on the same machine.

Frames are sampled evenly, resized to one size whose sides are multiples of 32 pixels, and taken in
pairs (temporal_patch); each pair is a run of tokens of its own, after its timestamp.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35.config.schema import PreprocessParameters
from qwen35.data.files import read_processor
from qwen35.data.image_processor import CONFIG, MAX_SIDES_RATIO, Odd
from qwen35.data.patches import Normalizer, PatchFormat, to_patches
from qwen35.data.record import Video
from qwen35.data.video_frames import VideoError, VideoMetadata, decode, read_metadata
from qwen35.wording import number_of

VIDEO_CONFIG = ("video_processor", "video_preprocessor_config.json", CONFIG[1])
MIN_FRAMES = 4  # that are taken, where there are as many


@dataclass(frozen=True)
class FrameSelection:
    """Which frames of a video are taken, at which size, and their times."""

    indices: list[int]  # of the frames, from 0
    grid: tuple[int, int, int]  # patches: (pairs of frames, height, width)
    timestamps: list[float]  # seconds, of each pair: half-way between its first and last frame


@dataclass(frozen=True)
class VideoProcessor(PatchFormat):
    fps: float
    max_frames: int
    min_pixels: int  # a frame, on average
    max_pixels: int

    @classmethod
    def from_folder(cls, folder: str | Path, settings: PreprocessParameters) -> "VideoProcessor":
        """By a model folder's video processor, else its image processor. Raises SettingError."""
        format_ = PatchFormat.of(*read_processor(folder, *VIDEO_CONFIG))
        return cls(
            **vars(format_),
            fps=settings.video_fps,
            max_frames=settings.video_maxlen,
            min_pixels=settings.video_min_pixels,
            max_pixels=settings.video_max_pixels,
        )

    def select_frames(self, video: Video, odd: Odd | None = None) -> FrameSelection:
        """By the video's metadata. Raises ImageError, and SettingError if PyAV is missing."""
        metadata, step = read_metadata(video, odd), self.temporal_patch
        if metadata.count < step:
            raise VideoError(f"has {number_of(metadata.count, 'frame')}, fewer than {step}", "video too short")
        indices, fps = self._sampled(metadata)
        height, width = self._resized(len(indices), metadata.height, metadata.width)
        full = indices + indices[-1:] * (-len(indices) % step)
        seconds = [(full[i] / fps + full[i + step - 1] / fps) / 2 for i in range(0, len(full), step)]
        return FrameSelection(indices, (len(full) // step, height // self.patch, width // self.patch), seconds)

    def patches(self, video: Video) -> tuple[Tensor, tuple[int, int, int]]:
        """Pixels [P, patch_dim] fp32, grid (t, h, w), P = t * h * w. Raises as `select_frames`."""
        selection = self.select_frames(video)
        t, h, w = selection.grid
        size = (h * self.patch, w * self.patch)
        frames = [_resize(frame, size) for frame in decode(video, selection.indices)]
        frames += frames[-1:] * (t * self.temporal_patch - len(frames))
        return to_patches(
            np.stack(frames), self.patch, self.merge, self.temporal_patch, self.normalizer
        ), selection.grid

    @cached_property
    def normalizer(self) -> Normalizer:
        return Normalizer.of_videos(self.scale, self.mean, self.std)

    def _sampled(self, video: VideoMetadata) -> tuple[list[int], float]:
        """Indices of the frames that are taken, and the frames a second that the video has."""
        if video.fps is None:
            count = min(video.count, self.max_frames)
        else:
            count = min(max(int(video.count / video.fps * self.fps), MIN_FRAMES), self.max_frames, video.count)
        indices = np.linspace(0, video.count - 1, count).round().astype(int)
        return indices.tolist(), self.fps if video.fps is None else video.fps

    def _resized(self, count: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the frames that are cut into patches. Raises VideoError."""
        side = self.patch * self.merge
        if height < side or width < side:
            grow = max(side / height, side / width)
            height, width = int(height * grow), int(width * grow)
        if max(height, width) > MAX_SIDES_RATIO * min(height, width):
            raise VideoError(f"is {width} x {height} pixels, one side more than {MAX_SIDES_RATIO} times the other")
        frames = round(count / self.temporal_patch) * self.temporal_patch
        return self.fitted(height, width, self.min_pixels * count, self.max_pixels * count, count, frames)


def _resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame [H, W, 3] uint8 at another (height, width), as torchvision resizes it on the host."""
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None]
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()
