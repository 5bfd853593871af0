"""Patches against transformers' image processor, sizes without decoding, and unusable files."""

import io
import json
import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps
from tokenizer_fixture import PUBLISHED

from bench.images import peer_processor
from qwen35.config.load import SettingError
from qwen35.data.image_processor import ImageError, ImageProcessor

MIN, MAX = 1024, 262144


@pytest.fixture(scope="module")
def processor():
    return ImageProcessor.from_folder(PUBLISHED, MIN, MAX)


@pytest.fixture(scope="module")
def peer():
    processor = peer_processor(PUBLISHED)
    clear = processor(images=Image.new("RGBA", (32, 32)), return_tensors="pt")["pixel_values"]
    processor.keeps_what_is_below = bool((clear != 1).any())  # until 5.20: the colours below the transparency
    return processor


def on_white(image):
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def picture(width, height, channels=3, seed=0):
    """Smooth and noisy parts, every value."""
    rng = np.random.default_rng([seed, width, height])
    y, x = np.mgrid[:height, :width]
    base = (x * 3 + y * 5)[..., None] + np.arange(channels) * 40 + rng.integers(0, 60, (height, width, channels))
    return (base % 256).astype(np.uint8).squeeze()


def agree(path, processor, peer):
    patches, grid = processor.patches(path)
    assert processor.grid(path) == grid
    image = ImageOps.exif_transpose(Image.open(path))
    image = on_white(image) if peer.keeps_what_is_below else image
    theirs = peer(images=image, input_data_format="channels_last", return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    assert patches.dtype == torch.float32 and patches.shape == (grid[1] * grid[2], processor.patch_dim)
    assert torch.equal(patches, theirs["pixel_values"])


SIZES = [
    (8, 8), (1, 1), (32, 32), (33, 31), (640, 480), (480, 640), (512, 512), (513, 512), (1000, 7), (3, 500), (200, 1), (1, 200),
    (1600, 1200), (64, 4096), (47, 48), (16, 16), (1025, 255), (80, 80),
]  # fmt: skip


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_sizes_equal_transformers(width, height, tmp_path, processor, peer):
    Image.fromarray(picture(width, height).reshape(height, width, 3)).save(tmp_path / "a.png")
    agree(tmp_path / "a.png", processor, peer)


def test_random_sizes_stay_within_the_limits(processor, peer):
    rng = random.Random(0)
    for _ in range(3000):
        height, width = (int(10 ** rng.uniform(0, 4.2)) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            continue
        new_height, new_width = processor._resized(height, width)
        assert new_height % 32 == new_width % 32 == 0
        assert new_height * new_width // 256 == peer.get_number_of_image_patches(height, width, {})
        assert new_height * new_width >= MIN


def save_modes(folder):
    """One file a mode and format."""
    rgb = Image.fromarray(picture(90, 70))
    alpha = Image.fromarray(picture(90, 70, channels=4))
    grey = Image.fromarray(picture(90, 70, channels=1))
    palette = rgb.quantize(32)
    wide = Image.fromarray((picture(90, 70, channels=1).astype(np.uint16)) * 3)
    files = {
        "rgb.jpg": rgb, "rgb.webp": rgb, "rgb.bmp": rgb, "rgb.tif": rgb, "rgb.ppm": rgb, "rgb.gif": palette,
        "rgba.png": alpha, "rgba.webp": alpha, "la.png": alpha.convert("LA"), "grey.png": grey, "grey.jpg": grey,
        "bits.png": grey.convert("1"), "palette.png": palette, "cmyk.jpg": rgb.convert("CMYK"), "cmyk.tif": rgb.convert("CMYK"),
        "wide.png": wide, "wide.tif": wide, "float.tif": grey.convert("F"), "ycc.jpg": rgb.convert("YCbCr"),
        "icon.ico": rgb.resize((64, 48)),
    }  # fmt: skip
    for name, image in files.items():
        image.save(folder / name)
    palette.save(folder / "clear palette.png", transparency=3)
    palette.save(folder / "clear.gif", transparency=3)
    rgb.save(folder / "clear.png", transparency=rgb.getpixel((0, 0)))
    rgb.save(folder / "two.gif", save_all=True, append_images=[rgb.rotate(90)])
    return sorted(folder.iterdir())


def test_modes_and_formats_equal_transformers(tmp_path, processor, peer):
    files = save_modes(tmp_path)
    assert len(files) == 24
    for path in files:
        agree(path, processor, peer)


def test_transparent_pixels_become_white(tmp_path, processor):
    Image.new("RGBA", (32, 32), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert (processor.patches(tmp_path / "a.png")[0] == 1).all()


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_transformers(kind, orientation, tmp_path, processor, peer):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(96, 40)).save(tmp_path / f"a.{kind}", exif=exif)
    agree(tmp_path / f"a.{kind}", processor, peer)
    _, h, w = processor.grid(tmp_path / f"a.{kind}")
    assert (h > w) == (orientation >= 5)


def test_orientation_after_the_pixels_of_a_png_is_found(tmp_path, processor, peer):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(picture(96, 40)).save(buffer, "PNG", exif=exif)
    data = buffer.getvalue()
    at = data.index(b"eXIf") - 4
    end = at + 12 + struct.unpack(">I", data[at : at + 4])[0]
    moved = data[:at] + data[end:-12] + data[at:end] + data[-12:]  # before IEND
    (tmp_path / "a.png").write_bytes(moved)
    agree(tmp_path / "a.png", processor, peer)
    assert processor.grid(tmp_path / "a.png")[1] > processor.grid(tmp_path / "a.png")[2]


def test_damaged_exif_is_ignored(tmp_path, processor):
    Image.fromarray(picture(96, 40)).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage")
    grid = processor.grid(tmp_path / "a.jpg")
    assert grid[2] > grid[1] and processor.patches(tmp_path / "a.jpg")[1] == grid


def test_grid_needs_only_the_header(tmp_path, processor):
    """The grid of a file whose pixels are missing."""
    Image.fromarray(picture(640, 480)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 3])
    assert processor.grid(tmp_path / "a.jpg") == (1, 26, 36)
    with pytest.raises(ImageError, match="cannot be read: image file is truncated"):
        processor.patches(tmp_path / "a.jpg")


def png_of(width, height):
    """A PNG whose header alone claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "^no such file$"),
        (b"hello", "^is not an image$"),
        (b"", "^is not an image$"),
        (png_of(10_000, 10_000), "^has more than 89,478,485 pixels$"),
        (png_of(100_000, 100_000), "^has more than 89,478,485 pixels$"),
        (png_of(50, 50), "^cannot be read: "),
    ],
    ids=["missing", "text", "empty", "big", "bomb", "no pixels"],
)
def test_unusable_files_are_image_errors(data, message, tmp_path, processor):
    path = tmp_path / "a.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        processor.patches(path)
    assert "\n" not in str(caught.value)


def test_eps_is_refused_and_not_run(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # calling None fails
    Image.fromarray(picture(90, 70)).save(tmp_path / "a.png", "EPS")
    for use in (processor.grid, processor.patches):
        with pytest.raises(ImageError, match=r"^is EPS, a program that draws, which is not run"):
            use(tmp_path / "a.png")


def test_sides_over_200_to_1_are_an_error(tmp_path, processor):
    for size in ((1, 201), (402, 2)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        for use in (processor.grid, processor.patches):
            with pytest.raises(
                ImageError, match=f"^is {size[0]} x {size[1]} pixels, one side more than 200 times the other$"
            ):
                use(tmp_path / "a.png")


def test_any_damage_is_an_image_error(tmp_path, processor):
    rng = random.Random(1)
    for path in save_modes(tmp_path):
        data = path.read_bytes()
        for _ in range(12):
            broken = bytearray(data)
            for _ in range(rng.randint(1, 20)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            path.write_bytes(broken[: rng.choice([len(broken), rng.randrange(len(broken))])])
            for use in (processor.grid, processor.patches):
                with suppress(ImageError):
                    use(path)


def test_unsupported_processor_settings_are_errors(tmp_path):
    config = json.loads((PUBLISHED / "preprocessor_config.json").read_text())
    for change, message in [
        ({"do_normalize": False}, "do_normalize: false is not supported"),
        ({"resample": 2}, r"resample: 2 is not supported, only 3"),
        ({"patch_size": ...}, "has no patch_size"),
    ]:
        other = {k: v for k, v in (config | change).items() if v is not ...}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
        with pytest.raises(SettingError, match=message):
            ImageProcessor.from_folder(tmp_path, MIN, MAX)
    with pytest.raises(SettingError, match=r"preprocessor_config\.json: no such file"):
        ImageProcessor.from_folder(tmp_path / "nowhere", MIN, MAX)
