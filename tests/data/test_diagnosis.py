"""Files of a wrong format or name: one short line says what they are and what to do."""

import base64
import io
import json
import os
import unicodedata

import pytest
from PIL import Image

from qwen35.data.image_processor import ImageError, upright_size
from qwen35.data.media import ImageFolder
from qwen35.data.mixture import dataset_files
from qwen35.data.readers import read_values
from qwen35.data.record import RecordError, Video
from qwen35.data.video_frames import VideoError, read_metadata
from qwen35.errors import SettingError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGES = (
    b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title>" + b" " * 9000,
    b"\n <html lang=en>",
    b"<!-- saved --> <!doctype HTML>",
)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100
ARROW = b"ARROW1\0\0" + b"\xff" * 50, b"\xff\xff\xff\xff\x70\1\0\0\x10\0"  # an IPC file, a stream
NOT_IMAGES = {
    "lfs": (LFS, r"is a pointer of Git LFS, not the file itself; fetch the files with git lfs pull"),
    "page": (PAGES[0], "is a web page, as a failed download leaves behind; download the file again"),
    "page 2": (PAGES[1], "is a web page, "),
    "page 3": (PAGES[2], "is a web page, "),
    "heic": (HEIC, "is HEIC, which is not read; make it JPEG or PNG"),
    "mif1": (HEIC.replace(b"ftypheic", b"ftypmif1"), "is HEIC, which is not read; make it JPEG or PNG"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "is SVG, .*; make it PNG"),
    "jxl": (b"\xff\x0a" + b"\0" * 50, "is JPEG XL, which is not read; make it JPEG or PNG"),
    "pdf": (b"%PDF-1.7\n", "is a PDF; make an image of each page"),
    "zip": (b"PK\x03\x04" + b"\0" * 50, "is compressed; unpack it first"),
}


def picture(file, form="PNG"):
    Image.new("RGB", (40, 50)).save(file, form)


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_a_file_that_is_not_an_image_is_named(tmp_path, name):
    data, words = NOT_IMAGES[name]
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=f"^{words}$" if words[-1] != " " else f"^{words}"):
        upright_size(tmp_path / "a.jpg")


def test_avif_is_read_or_named(tmp_path):
    """It is read if this Pillow has a decoder."""
    from PIL import features

    file = tmp_path / "a.jpg"
    if features.check("avif"):
        picture(file, "AVIF")
        assert upright_size(file) == (40, 50)
    else:
        file.write_bytes(HEIC.replace(b"ftypheic", b"ftypavif"))
        with pytest.raises(ImageError, match=r"^is AVIF, which this Pillow does not read; make it JPEG or PNG$"):
            upright_size(file)


@pytest.mark.parametrize("data", [LFS, PAGES[0], *ARROW], ids=["lfs", "page", "arrow file", "arrow stream"])
def test_a_file_that_holds_no_records_is_named(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(
        RecordError, match=r"a\.json: is (a pointer of Git LFS|a web page|an Arrow file, .* parquet)"
    ) as caught:
        list(read_values(tmp_path / "a.json"))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("data", [LFS, PAGES[0]], ids=["lfs", "page"])
def test_a_file_that_is_not_a_video_is_named(tmp_path, data, monkeypatch):
    import sys

    from optional import HAS_AV, stand_in_for_av

    if not HAS_AV:
        monkeypatch.setitem(sys.modules, "av", stand_in_for_av())
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(VideoError, match=r"^is a (pointer of Git LFS|web page)"):
        read_metadata(Video(tmp_path / "a.mp4"))


@pytest.mark.parametrize(("on_disk", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_another_unicode_form(tmp_path, on_disk, asked):
    folder = tmp_path / unicodedata.normalize(on_disk, "Zürich")
    folder.mkdir()
    picture(folder / unicodedata.normalize(on_disk, "é.png"))
    path = ImageFolder(tmp_path).path(unicodedata.normalize(asked, "Zürich/é.png"))
    with pytest.raises(ImageError) as caught:
        upright_size(path)
    assert caught.value.kind == "image missing"
    assert str(caught.value) == (
        f"no such file; there is one with its name written in the Unicode form {on_disk}: rename it, or write its name "
        "that way"
    )


@pytest.mark.parametrize(
    ("asked", "how"),
    [("a\\b\\1 2.png", r"with / for \\"), ("file://a/b/1%202.png", "without the %-codes of a URL")],
)
def test_a_name_with_backslashes_or_percent_codes(tmp_path, asked, how):
    (tmp_path / "a/b").mkdir(parents=True)
    picture(tmp_path / "a/b/1 2.png")
    with pytest.raises(ImageError, match=f"^no such file; there is one with its name written {how}: "):
        upright_size(ImageFolder(tmp_path).path(asked))
    for name in (
        "c\\d.png",
        "x%20y.png",
        "..\\..\\etc\\passwd",
        "%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "é" * 60 + ".png",
    ):
        with pytest.raises(ImageError, match=r"^no such file$"):
            upright_size(ImageFolder(tmp_path).path(name))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_base64_without_its_prefix(tmp_path, form):
    data = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(data, form)
    text = base64.b64encode(data.getvalue()).decode()
    folder = ImageFolder(tmp_path, tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"… is an image in base64 without its prefix, such as data:image/png;base64,$"
    ) as caught:
        folder.image(text)
    assert len(str(caught.value)) < 200
    assert upright_size(folder.image(f"data:image/png;base64,{text}")) == (64, 64)


def test_messages_are_short_whatever_the_record_holds(tmp_path):
    folder = ImageFolder(tmp_path)
    for name in ("../" * 3000 + "x.png", "/etc/" + "x/" * 3000 + "..", "http://" + "x" * 9000, "data:" + "x" * 9000):
        with pytest.raises(ValueError) as caught:
            folder.image(name)
        assert len(str(caught.value)) < 300


def test_a_pipe_or_a_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("a.json", "zero.json"):
        with pytest.raises(SettingError, match=rf"{name}: is a pipe or a device; write its records to a file first$"):
            dataset_files(str(tmp_path / name))


def test_records_that_merely_contain_html_are_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"a": "<html>"}]))
    assert list(read_values(tmp_path / "a.json")) == [{"a": "<html>"}]
