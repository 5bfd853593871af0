"""The frames of a video: of a file (read with PyAV), a folder of image files, or a list of them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen35.data.image_processor import DAMAGED, ImageError, Odd, read_rgb, upright_size
from qwen35.data.media import why_missing, wrong_format
from qwen35.data.record import Video
from qwen35.errors import SettingError, one_line

IMAGE_SUFFIXES = {  # of frames
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip
OTHER_SUFFIXES = {".heic", ".heif", ".jp2", ".jxl", ".tga", ".dng", ".exr", ".svg"}  # of images all the same
# ffmpeg's names of the formats that are opened; none of them can refer to other files
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc"
RAW = ("h264", "hevc")  # of these: streams without times and rate, for which ffmpeg takes 25 frames a second
JUMP = ("mpegts", "mpeg")  # of these: recordings, whose times may begin anew in the middle
FRAME_COUNT_LIMIT = 10_000_000  # more than that in a header is taken for damage
RATE_ERROR = 0.05  # up to which a header's frame rate is believed: times are rounded, to milliseconds often
DRIFT = 0.5  # seconds by which a frame's own time may be off the one that its number and the rate give


class VideoError(ImageError):
    """A video that cannot be used, and why."""

    def __init__(self, message: str, kind: str = "video broken"):
        super().__init__(message, kind)


@dataclass(frozen=True)
class VideoMetadata:
    """What is known of a video before it is decoded. Sizes are those of the upright frame."""

    count: int  # frames
    fps: float | None  # frames a second; None: not known
    width: int
    height: int


def read_metadata(video: Video, odd: Odd | None = None) -> VideoMetadata:
    """Decodes at most one frame. Raises VideoError, and SettingError if PyAV is missing."""
    files = _files(video)
    if isinstance(files, Path):
        return _file_metadata(files, video, odd)
    for number, file in enumerate(files):  # missing files are errors now, broken ones when they are decoded
        if not file.is_file():
            with _naming_frame(file, number, len(files)):
                raise ImageError("is not a file" if file.exists() else why_missing(file), "image missing")
    with _naming_frame(files[0], 0, len(files)):
        width, height = upright_size(files[0], odd)
    return VideoMetadata(len(files), video.fps, width, height)


def decode(video: Video, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """Frames of ascending numbers, [H, W, 3] uint8 RGB, of one size. Raises as `read_metadata`."""
    files = _files(video)
    frames = _decode_file(files, numbers) if isinstance(files, Path) else _decode_images(files, numbers)
    shape = None
    for number, frame in zip(numbers, frames, strict=True):
        shape = frame.shape if shape is None else shape
        if frame.shape != shape:
            raise VideoError(
                f"frame {number + 1} is {frame.shape[1]} x {frame.shape[0]} pixels, others {shape[1]} x {shape[0]}"
            )
        yield frame


def _files(video: Video) -> Path | Sequence[Path]:
    """The video file, or the image files of the frames."""
    if not isinstance(video.source, Path) or not video.source.is_dir():
        return video.source
    try:
        files = [path for path in video.source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES | OTHER_SUFFIXES]
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from None
    files = [path for path in files if not path.name.startswith(".")]
    if links := [path for path in files if path.is_symlink()]:
        raise VideoError(f"{links[0].name} is a link; name the frames in a list, or copy them")
    if others := [path.name for path in files if path.suffix.lower() in OTHER_SUFFIXES]:
        raise VideoError(f"{min(others)} is a frame in a format that is not read; make it JPEG or PNG, or move it away")
    if not files:
        raise VideoError("is a folder without frames: image files named in their order")
    return sorted(files, key=_natural_order)


def _natural_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """A sort key by which frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part[:18]), "") if part.isdecimal() else (-1, part) for part in parts], path.name


@contextmanager
def _naming_frame(path: Path, number: int, count: int) -> Iterator[None]:
    """Any ImageError inside becomes a VideoError that names the frame."""
    try:
        yield
    except ImageError as error:
        raise VideoError(f"frame {number + 1} of {count}, {path.name}: {error}", error.kind) from None


def _decode_images(files: Sequence[Path], numbers: Sequence[int]) -> Iterator[np.ndarray]:
    for number in numbers:
        with _naming_frame(files[number], number, len(files)):
            pixels = np.asarray(read_rgb(files[number]))
        yield pixels


# -- files, with PyAV ------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; any error of reading it is a VideoError."""
    if not path.is_file():
        raise VideoError("is not a file" if path.exists() else why_missing(path), "video missing")
    try:
        import av
    except ModuleNotFoundError:
        raise SettingError(
            f"{path}: a video file needs PyAV, which is missing; install it (.venv/bin/pip install av), or give the frames as "
            "images in a folder"
        ) from None
    try:
        # given a file object and a list of formats, ffmpeg opens no other file
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


def _file_metadata(path: Path, video: Video, odd: Odd | None) -> VideoMetadata:
    if video.fps is not None:
        raise VideoError("is a file, which has its own frame rate; remove sample_fps", "malformed")
    with _opened(path) as (container, stream):
        if container.format.name in RAW:
            raise VideoError(
                "is a raw stream, which has no frame rate; make it MP4: ffmpeg -r RATE -i FILE -c copy FILE.mp4"
            )
        count, rate, width, height = stream.frames, stream.average_rate, stream.width, stream.height
        base = stream.base_rate  # of which all times are multiples, as far as ffmpeg has looked
        if not count or (rate and base and abs(rate / base - 1) > RATE_ERROR):  # some containers do not store it
            packets = [p.pts for p in islice(container.demux(stream), FRAME_COUNT_LIMIT) if p.size]
            times = np.sort(np.array([p for p in packets if p is not None], dtype=float) * float(stream.time_base))
            if len(packets) == len(times) > 1 and times[0] < times[-1]:
                own = (len(times) - 1) / (times[-1] - times[0])
                is_wrong = not rate or (abs(rate / own - 1) > RATE_ERROR and container.format.name not in JUMP)
                rate = own if not count and is_wrong else rate
                if odd is not None:
                    odd += _oddities(times, float(rate), container.duration)
            count = count or len(packets)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise VideoError(f"has frames of more than {limit:,} pixels")
    if not rate or count < 1 or width < 1 or height < 1 or count > FRAME_COUNT_LIMIT:
        raise VideoError("its header has no usable frame rate, frame count or frame size")
    with _opened(path) as (container, stream):  # once more: counting may have read to the end
        first = next(container.decode(stream), None)
        is_upright = first is None or _quarter_turns(first) % 2 == 0
    return VideoMetadata(count, float(rate), *((width, height) if is_upright else (height, width)))


def _oddities(times: np.ndarray, rate: float, duration: int | None) -> Odd:
    """times [T]: seconds of each frame; duration: that of the file, in microseconds."""
    times = times - times[0]
    drift = np.abs(times - np.arange(len(times)) / rate).max()
    missing = (duration or 0) / 1e6 - times[-1] - 1 / rate
    return ["uneven"] * bool(drift > DRIFT) + ["short"] * bool(missing > 2 * DRIFT)


def _quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns to the upright frame; phones store how they were held."""
    if frame.rotation % 90:
        raise VideoError(f"is rotated by {frame.rotation} degrees; only quarter turns are supported")
    return int(frame.rotation) // 90


def _decode_file(path: Path, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    wanted, decoded = set(numbers), 0
    with _opened(path) as (container, stream):
        for number, frame in enumerate(islice(container.decode(stream), max(numbers, default=-1) + 1)):
            if number in wanted:
                decoded += 1
                yield np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame))
    if decoded < len(wanted):
        raise VideoError("ends before the last of its frames")
