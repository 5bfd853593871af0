"""The frames of a video: a file (read with PyAV), a folder of image files, or a list of them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen35.data.diagnosis import why_missing, wrong_format
from qwen35.data.image_processor import DAMAGED, ImageError, read_rgb, upright_size
from qwen35.data.record import Video
from qwen35.errors import SettingError, one_line

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc"  # none that names further files
)
MOST_FRAMES = 10_000_000  # that a header may claim


class VideoError(ImageError):
    """A video that cannot be used, and why."""

    def __init__(self, message: str, kind: str = "video broken"):
        super().__init__(message, kind)


@dataclass(frozen=True)
class Reel:
    """What is known of a video before it is decoded."""

    count: int  # frames
    fps: float | None  # of them a second; None: not said
    width: int
    height: int


def reel(video: Video) -> Reel:
    """Raises VideoError, ImageError; SettingError where PyAV is needed and missing."""
    files = _frame_files(video)
    if files is None:
        return _file_reel(_path_of(video), video)
    for number, file in enumerate(files):  # missing ones show now, broken ones when they are decoded
        if not file.is_file():
            with _frame(file, number, len(files)):
                raise ImageError("is no file" if file.exists() else why_missing(file), "image missing")
    with _frame(files[0], 0, len(files)):
        width, height = upright_size(files[0])
    return Reel(len(files), video.fps, width, height)


def decode(video: Video, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """Those of the frames, ascending numbers from 0, each [H, W, 3] uint8 RGB, all of one size. Raises as `reel`."""
    files = _frame_files(video)
    frames = _decode_file(_path_of(video), numbers) if files is None else _decode_images(files, numbers)
    first = None
    for number, frame in zip(numbers, frames, strict=True):
        first = frame.shape if first is None else first
        if frame.shape != first:
            raise VideoError(
                f"frame {number + 1} is {frame.shape[1]} x {frame.shape[0]} pixels, others {first[1]} x {first[0]}"
            )
        yield frame


def _path_of(video: Video) -> Path:
    assert isinstance(video.source, Path)
    return video.source


def _frame_files(video: Video) -> Sequence[Path] | None:
    """The image files of the frames, or None if the video is one file."""
    if not isinstance(video.source, Path):
        return video.source
    if not video.source.is_dir():
        return None
    try:
        found = [path for path in video.source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from None
    found = [path for path in found if not path.name.startswith(".")]
    if links := [path for path in found if path.is_symlink()]:
        raise VideoError(f"{links[0].name} is a link; name the frames in a list, or copy them")
    if not found:
        raise VideoError("is a folder without frames: image files named in their order")
    return sorted(found, key=_natural)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """2 before 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part[:18]), "") if part.isdecimal() else (-1, part) for part in parts], path.name


@contextmanager
def _frame(path: Path, number: int, count: int) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise VideoError(f"frame {number + 1} of {count}, {path.name}: {error}", error.kind) from None


def _decode_images(files: Sequence[Path], numbers: Sequence[int]) -> Iterator[np.ndarray]:
    for number in numbers:
        with _frame(files[number], number, len(files)):
            pixels = np.asarray(read_rgb(files[number]))
        yield pixels


# -- files, with PyAV ---------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; whatever goes wrong inside is a VideoError."""
    if not path.is_file():
        raise VideoError("is no file" if path.exists() else why_missing(path), "video missing")
    try:
        import av
    except ModuleNotFoundError:
        raise SettingError(
            f"{path}: a video file needs PyAV, which is missing; install it (.venv/bin/pip install av), or give the frames as "
            "images in a folder"
        ) from None
    try:
        # a file object and a list of formats, so that nothing but this file is ever opened; its title may be in any encoding
        options = {"format_whitelist": CONTAINERS}
        with path.open("rb") as file, av.open(file, options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise VideoError("has no video stream")
            yield container, container.streams.video[0]
    except VideoError:
        raise
    except (av.error.FFmpegError, *DAMAGED) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise VideoError(wrong_format(path) or f"cannot be read: {reason}") from None


def _file_reel(path: Path, video: Video) -> Reel:
    if video.fps is not None:
        raise VideoError(
            "is a file, which says itself how many frames a second it has; leave out sample_fps", "malformed"
        )
    with _opened(path) as (container, stream):
        count, rate, width, height = stream.frames, stream.average_rate, stream.width, stream.height
        if not count:  # some containers do not say
            count = sum(1 for packet in islice(container.demux(stream), MOST_FRAMES) if packet.size)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise VideoError(f"has frames of more than {limit:,} pixels")
    if not rate or count < 1 or width < 1 or height < 1 or count > MOST_FRAMES:
        raise VideoError("its header does not say how many frames of which size it has")
    with _opened(path) as (container, stream):  # again: counting may have read it to its end
        first = next(container.decode(stream), None)
        is_upright = first is None or _turns(first) % 2 == 0
    return Reel(count, float(rate), *((width, height) if is_upright else (height, width)))


def _turns(frame: Any) -> int:
    """How many quarter turns, counter-clockwise, show a frame upright: phones film as they are held, and say how that was."""
    if frame.rotation % 90:
        raise VideoError(f"is to be shown turned by {frame.rotation} degrees; only quarter turns are read")
    return int(frame.rotation) // 90


def _decode_file(path: Path, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    wanted, found = set(numbers), 0
    with _opened(path) as (container, stream):
        for number, frame in enumerate(islice(container.decode(stream), max(numbers, default=-1) + 1)):
            if number in wanted:
                found += 1
                yield np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame))
    if found < len(wanted):
        raise VideoError("ends before the last of its frames")
