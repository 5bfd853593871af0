"""Why a file cannot be used, and what to do: its first bytes or similar file names tell."""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

COMPRESSED = "is compressed; unpack it first"
LFS = "is a pointer of Git LFS, not the file itself; fetch the files with git lfs pull"
PAGE = "is a web page, as a failed download leaves behind; download the file again"
SIGNATURES = (
    # zip, gzip, bzip2, xz, zstd, 7z
    (rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c", COMPRESSED),
    (rb"version https://git-lfs\.", LFS),
    (rb"(?i:\s*(<!--.*?-->\s*)?<(!doctype )?html)", PAGE),
    (rb"(?i:\s*(<\?xml.*?\?>\s*)?(<!.*?>\s*)*<svg)", "is SVG, a vector drawing, which is not read; make it PNG"),
    (rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", "is HEIC, which is not read; make it JPEG or PNG"),
    (rb"....ftypavi[fs]", "is AVIF, which this Pillow does not read; make it JPEG or PNG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "is JPEG XL, which is not read; make it JPEG or PNG"),
    (rb"%PDF-", "is a PDF; make an image of each page"),
)
HEAD = 512  # bytes that are compared with SIGNATURES


def wrong_format(path: str | Path) -> str | None:
    """What a file of a recognised, unsupported format is, and what to do. Raises OSError."""
    with Path(path).open("rb") as file:
        head = file.read(HEAD)
    return next((message for pattern, message in SIGNATURES if re.match(pattern, head, re.DOTALL)), None)


def why_missing(path: str | Path) -> str:
    """The message about a file that does not exist, naming the form of a similar one that does."""
    for other, how in _other_names(str(path)):
        if other != str(path) and os.path.isfile(other):  # noqa: PTH113  # False for names that are too long, too
            return f"no such file; there is one with its name written {how}: rename it, or write its name that way"
    return "no such file"


def _other_names(path: str) -> Iterator[tuple[str, str]]:
    yield _in_form(path, "NFC"), "in the Unicode form NFC"
    yield _in_form(path, "NFD"), "in the Unicode form NFD"
    if ".." not in path.replace("\\", "/").split("/"):
        yield path.replace("\\", "/"), "with / for \\"
    if ".." not in unquote(path).split("/"):
        yield unquote(path), "without the %-codes of a URL"


def _in_form(path: str, form: Literal["NFC", "NFD"]) -> str:
    """The path with each name that does not exist as given normalised to this form."""
    folder = "/" if path.startswith("/") else ""
    for name in path.strip("/").split("/"):
        same = os.path.join(folder, name)  # noqa: PTH118
        exists = os.path.exists(same)  # noqa: PTH110
        folder = same if exists else os.path.join(folder, unicodedata.normalize(form, name))  # noqa: PTH118
    return folder
