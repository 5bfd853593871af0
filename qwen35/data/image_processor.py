"""Image files to patches, bit for bit as the PIL version of transformers' Qwen2VL image processor.

An image is turned upright (EXIF), composited on white where it is transparent, converted to RGB,
resized to sides that are multiples of 32 pixels within image_min_pixels..image_max_pixels, and
split into patches of 16 x 16, those of a 2 x 2 block next to each other. As in that processor,
Pillow's conversion clips 16-bit grey at 255 instead of scaling it, and of several frames or pages
only the first is used: `Odd` collects such images.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from qwen35.data.files import read_processor
from qwen35.data.media import why_missing, wrong_format
from qwen35.data.patches import Normalizer, PatchFormat, to_patches
from qwen35.errors import UserError, one_line

Odd = list[str]  # "deep": more than 8 bits a channel; "frames": several frames or pages
CONFIG = ("image_processor", "preprocessor_config.json")  # a section of processor_config.json, or a file
MAX_SIDES_RATIO = 200  # transformers' own limit
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {  # orientation -> what turns such an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIZE_IN_HEADER = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"}  # others may change it when they load
DAMAGED = (  # what Pillow and its plugins raise for damaged files
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
    MemoryError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip


class ImageError(UserError):
    """An image file that cannot be used, and why."""

    def __init__(self, message: str, kind: str = "image broken"):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class ImageProcessor(PatchFormat):
    min_pixels: int
    max_pixels: int

    @classmethod
    def from_folder(cls, folder: str | Path, min_pixels: int, max_pixels: int) -> "ImageProcessor":
        """By a model folder's processor; the limits replace its `size`. Raises SettingError."""
        format_ = PatchFormat.of(*read_processor(folder, *CONFIG))
        return cls(**vars(format_), min_pixels=min_pixels, max_pixels=max_pixels)

    def grid(self, path: str | Path, odd: Odd | None = None) -> tuple[int, int, int]:
        """(1, h, w) in patches, by the file's header: nothing is decoded. Raises ImageError."""
        width, height = upright_size(path, odd)
        height, width = self._resized(height, width)
        return 1, height // self.patch, width // self.patch

    def patches(self, path: str | Path) -> tuple[Tensor, tuple[int, int, int]]:
        """Pixels [P, patch_dim] fp32 and the grid (1, h, w), P = h * w. Raises ImageError."""
        with _opened(path) as image:
            rgb = _rgb(_upright(image))
            height, width = self._resized(rgb.height, rgb.width)
            pixels = np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))  # [H, W, 3] uint8
        grid = (1, height // self.patch, width // self.patch)
        return to_patches(pixels[None], self.patch, self.merge, self.temporal_patch, self.normalizer), grid

    @cached_property
    def normalizer(self) -> Normalizer:
        return Normalizer.of_images(self.scale, self.mean, self.std)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the image that is cut into patches. Raises ImageError."""
        if max(height, width) > MAX_SIDES_RATIO * min(height, width):
            raise ImageError(f"is {width} x {height} pixels, one side more than {MAX_SIDES_RATIO} times the other")
        return self.fitted(height, width, self.min_pixels, self.max_pixels)


def read_rgb(path: str | Path) -> Image.Image:
    """The upright image in RGB, composited on white. Raises ImageError."""
    with _opened(path) as image:
        return _rgb(_upright(image))


def upright_size(path: str | Path, odd: Odd | None = None) -> tuple[int, int]:
    """(width, height) of the upright image, by its header where possible. Raises ImageError."""
    with _opened(path) as image:
        size = _upright_size(image, path)
        if odd is not None:
            odd += _oddities(image)
        return size


def _oddities(image: Image.Image) -> Iterator[str]:
    if image.mode.startswith(("I", "F")):
        yield "deep"
    with suppress(*DAMAGED):  # what follows the first frame is not needed
        if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's photo and its preview
            yield "frames"


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The opened image; any error of opening or reading it is an ImageError."""
    try:
        if not Path(path).is_file() and Path(path).exists():  # reading a pipe would never return
            raise ImageError("is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format == "EPS":  # Pillow would run it with Ghostscript
                    raise ImageError("is EPS, a program that draws, which is not run; make it PNG or JPEG")
                yield image
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(why_missing(path), "image missing") from None
    except Image.UnidentifiedImageError:
        raise ImageError(wrong_format(path) or "is not an image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ImageError(f"cannot be read: {reason}") from None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where there is none or the EXIF data is damaged."""
    if image.format == "TIFF":
        return 1  # Pillow itself turns TIFF files
    try:
        return Image.Image.getexif(image).get(ORIENTATION, 1)
    except DAMAGED:
        return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    turn = UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _upright_size(image: Image.Image, path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright image, decoded only if the header may not be right."""
    if image.format not in SIZE_IN_HEADER or (image.format == "PNG" and _png_has_late_metadata(path)):
        image.load()
    width, height = image.size
    return (height, width) if _orientation(image) in {5, 6, 7, 8} else (width, height)


def _png_has_late_metadata(path: str | Path) -> bool:
    """Whether chunks that can hold the orientation follow the pixels: only decoding finds them."""
    pixels_seen = False
    with Path(path).open("rb") as file:
        file.seek(8)  # signature
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            pixels_seen |= kind == b"IDAT"
            if pixels_seen and kind in {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}:
                return True
            file.seek(length + 4, 1)  # data and checksum
    return False


def _rgb(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    overlay = image.convert("RGBA")
    white = Image.new("RGBA", overlay.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, overlay).convert("RGB")
