"""Where the images and videos of records lie: below one folder, and nowhere else."""

import base64
import binascii
import hashlib
import os
import re
import stat
from pathlib import Path

from qwen35.data.files import replacing
from qwen35.errors import SettingError, shortened

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
LOCAL = "file://"
DATA_URL = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w.+=-]+)*;base64,", re.IGNORECASE)
BASE64 = re.compile(  # of a JPEG, PNG, GIF or WebP; of anything that is too long for a name
    r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[\w+/=\s-]{60,}|(?=.*[A-Z])(?=.*[a-z])(?=.*[0-9])[\w+/=\s-]{256,}", re.ASCII
)
SHOWN = 80  # characters of a name that a message repeats


class ImageFolder:
    """Turns the path in a record into a real one, which must lie below `root` (dataset_dir), links followed."""

    def __init__(self, root: str | Path, cache_dir: str | Path | None = None):
        """cache_dir: where images that a record holds itself become files. Raises SettingError if there is no folder `root`."""
        if not Path(root).is_dir():
            raise SettingError(f"dataset_dir: {root}: no such folder; it is where the records' images lie")
        self.root = str(root)
        self._real = os.path.realpath(root)  # unlike Path.resolve, lets a loop of links be
        self.real_root = Path(self._real)
        self._kept = None if cache_dir is None else Path(cache_dir) / "images"
        self._real_folders: dict[str, str] = {}  # following links is slow on a network disk: once a folder

    def path(self, name: str) -> Path:
        """Raises ValueError if `name` leaves the folder, OSError if it is no name. Does not ask for the file to be there."""
        if "\0" in name:
            raise ValueError("has a NUL character")
        name = name.removeprefix(LOCAL)
        if ADDRESS.match(name):
            raise ValueError(f"{name[:SHOWN]!r} is an address; only files below dataset_dir are read, so download it")
        whole = os.path.join(self._real, name.rstrip("/"))  # noqa: PTH118  # pathlib is slow where every record passes
        folder, last = os.path.split(whole)
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
        """As `path`; also of a `data:` URL, whose image becomes a file in the cache."""
        if len(name) > SHOWN and BASE64.fullmatch(name):
            raise ValueError(
                f"{name[:40]!r}… is an image in base64 without its beginning, data:image/png;base64, or the like"
            )
        if name[:5].lower() != "data:":
            return self.path(name)
        head = DATA_URL.match(name)
        if head is None:
            raise ValueError(f"{name[:40]!r}… is no image in base64")
        try:
            return self.keep(base64.b64decode(name[head.end() :], validate=True))
        except binascii.Error as error:
            raise ValueError(f"{name[:40]!r}… is not base64: {error}") from None

    def keep(self, data: bytes) -> Path:
        """The file of an image that a record holds itself, named by its content: several processes may keep the same.

        Raises ValueError if there is no cache_dir, SettingError if it cannot be written.
        """
        if self._kept is None:
            raise ValueError("holds an image itself; set cache_dir, where such images become files")
        digest = hashlib.sha256(data).hexdigest()
        path = Path(os.path.realpath(self._kept)) / digest[:2] / digest
        if path.is_file() and path.stat().st_size == len(data):
            return path
        try:
            path.unlink(missing_ok=True)  # one that was cut short
            with replacing(path, keep_first=True) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise SettingError(f"cache_dir: {path}: cannot be written: {error.strerror}") from None
        return path


def _mode(path: str) -> int:
    """0 of a file that is not there. Raises OSError where the path is no name at all."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
