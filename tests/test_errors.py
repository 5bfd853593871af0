"""Files of text that are none: nothing is read that might never end, or that cannot be what it should."""

import os
import threading
from pathlib import Path

import pytest

from qwen35.errors import LARGEST_TEXT, UserError, read_object, read_text
from qwen35.model import ConfigError, load_config


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fifo, "cannot be read: a pipe or a device, not a file"),
        (device, "cannot be read: a pipe or a device, not a file"),
        (huge, "cannot be read: 67,108,865 bytes, more than 67,108,864"),
        (Path.mkdir, "cannot be read: Is a directory"),
        (lambda path: None, "no such file"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_of_text_is_refused_at_once(tmp_path, make, words):
    path = tmp_path / "config.json"
    make(path)
    found = []

    def look():
        for read, kind in (
            (read_text, UserError),
            (read_object, UserError),
            (lambda p, _: load_config(p), ConfigError),
        ):
            with pytest.raises(kind) as caught:
                read(path, kind)
            found.append(str(caught.value))

    thread = threading.Thread(target=look, daemon=True)  # a hang fails the test and does not hold it up
    thread.start()
    thread.join(20)
    assert len(found) == 3 and all(text.startswith(f"{path}: ") for text in found)
    assert all(text.endswith(words) for text in found[:2])


def test_a_file_of_the_largest_size_is_read(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b" " * (LARGEST_TEXT - 2) + b"{}")
    assert read_object(path, UserError) == {}
    path.write_bytes(b"")
    assert read_text(path, UserError) == ""
