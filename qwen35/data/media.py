"""Where the images and videos of records are, below one folder, and why one cannot be used."""

import base64
import binascii
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from qwen35.data.files import replacing
from qwen35.errors import SettingError, shortened

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
FILE_URL = "file://"
DATA_URL = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w.+=-]+)*;base64,", re.IGNORECASE)
BASE64 = re.compile(  # the first bytes of a JPEG, PNG, GIF or WebP; or any text too long for a file name
    r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[\w+/=\s-]{60,}|(?=.*[A-Z])(?=.*[a-z])(?=.*[0-9])[\w+/=\s-]{256,}", re.ASCII
)
SHOWN = 80  # characters of a name that a message repeats
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
    (
        rb"ARROW1|\xff\xff\xff\xff..\0\0",
        "is an Arrow file, which is not read; write it as parquet (datasets: to_parquet)",
    ),
    (rb"%PDF-", "is a PDF; make an image of each page"),
)
HEAD = 512  # bytes that are compared with SIGNATURES


class ImageFolder:
    """Resolves the paths in records, which must lie below `root` (dataset_dir), links followed."""

    def __init__(self, root: str | Path, cache_dir: str | Path | None = None):
        """cache_dir: for embedded images. Raises SettingError if `root` is not a folder."""
        if not Path(root).is_dir():
            raise SettingError(f"dataset_dir: {root}: no such folder; it must hold the records' images")
        self.root = str(root)
        self._real = os.path.realpath(root)  # unlike Path.resolve, accepts a loop of links
        self.real_root = Path(self._real)
        self._embedded = None if cache_dir is None else Path(cache_dir) / "images"
        self._real_folders: dict[str, str] = {}  # following links is slow on network disks: once per folder

    def path(self, name: str) -> Path:
        """The real path of a file, which need not exist.

        Raises ValueError if it is not below the folder, OSError if `name` cannot be a path.
        """
        if "\0" in name:
            raise ValueError("has a NUL character")
        name = name.removeprefix(FILE_URL)
        if URL.match(name):
            raise ValueError(f"{name[:SHOWN]!r} is a URL; only files below dataset_dir are read, so download it")
        joined = os.path.join(self._real, name.rstrip("/"))  # noqa: PTH118  # pathlib is too slow for every record
        folder, last = os.path.split(joined)
        if last in {"", ".", ".."}:
            raise ValueError(f"{shortened(name, SHOWN)!r} is not a file name")
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        path = os.path.join(self._real_folders[folder], last)  # noqa: PTH118
        if stat.S_ISLNK(_mode(path)):
            path = os.path.realpath(path)
        if not path.startswith(self._real.rstrip("/") + "/"):
            raise ValueError(f"{shortened(name, SHOWN)!r} lies outside dataset_dir {self.root}")
        return Path(path)

    def image(self, name: str) -> Path:
        """Like `path`, but also accepts a `data:` URL, whose image is stored as a file."""
        if len(name) > SHOWN and BASE64.fullmatch(name):
            raise ValueError(f"{name[:40]!r}… is an image in base64 without its prefix, such as data:image/png;base64,")
        if name[:5].lower() != "data:":
            return self.path(name)
        head = DATA_URL.match(name)
        if head is None:
            raise ValueError(f"{name[:40]!r}… is not an image in base64")
        try:
            return self.store(base64.b64decode(name[head.end() :], validate=True))
        except binascii.Error as error:
            raise ValueError(f"{name[:40]!r}… is not base64: {error}") from None

    def store(self, data: bytes) -> Path:
        """Store an embedded image as a file named by its digest; several processes may do the same.

        Raises ValueError if there is no cache_dir, SettingError if it cannot be written.
        """
        if self._embedded is None:
            raise ValueError("holds an embedded image; set cache_dir, where such images are stored as files")
        digest = hashlib.sha256(data).hexdigest()
        path = Path(os.path.realpath(self._embedded)) / digest[:2] / digest
        if path.is_file() and path.stat().st_size == len(data):
            return path
        try:
            path.unlink(missing_ok=True)  # an incomplete one
            with replacing(path, keep_first=True) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise SettingError(f"cache_dir: {path}: cannot be written: {error.strerror}") from None
        return path


def _mode(path: str) -> int:
    """The mode of a file, 0 if it does not exist. Raises OSError if the path cannot be one."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


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
