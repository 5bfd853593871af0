"""Messages with foreign text: no character that a terminal would act on or hide.

And reading text files: pipes, devices and files that are too large are refused.
"""

import os
import threading
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35.data.record import LONGEST_MESSAGE, RecordError
from qwen35.errors import (
    LARGEST_TEXT,
    LONGEST_LINE,
    SettingError,
    UserError,
    complain,
    one_line,
    read_object,
    read_text,
    shortened,
    visible,
)
from qwen35.model import ConfigError, load_config

HOSTILE = "\x1b[2J", "\x9b2J", "\u202egpj.exe", "\u2066", "\u200b", "\u2028", "\u2029", "\ufeff", "\u00ad", "\U000e0041"
CODES = (
    r"\x1b[2J",
    r"\x9b2J",
    r"\u202egpj.exe",
    r"\u2066",
    r"\u200b",
    r"\u2028",
    r"\u2029",
    r"\ufeff",
    r"\xad",
    r"\U000e0041",
)


@pytest.mark.parametrize(("text", "shown"), list(zip(HOSTILE, CODES, strict=True)))
def test_control_and_hidden_characters_are_shown_as_codes(text, shown, capsys):
    assert visible(f"a{text}b") == f"a{shown}b"
    for error in (UserError(f"a{text}b"), RecordError(f"a{text}b"), OSError(2, "no such file", f"a{text}b")):
        assert complain(error) == 1
        printed = capsys.readouterr().err
        assert f"a{shown}b" in printed and printed.count("\n") == 1 and printed[:-1].isprintable()


@given(st.text())
def test_visible_text_is_printable_and_one_line(text):
    shown = visible(text)
    shown.encode()
    assert len(f"|{shown}|".splitlines()) == 1
    categories = {unicodedata.category(c) for c in shown}
    assert not categories & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize("text", ["plain", "é 你好 \u3000 عربي", "a b"])
def test_text_of_any_language_is_unchanged(text):
    assert visible(text) == text


def test_half_a_surrogate_pair_can_be_printed(capsys):
    complain(RecordError("id \ud83d"))
    assert capsys.readouterr().err == "error: id \\ud83d\n"


def test_characters_to_keep_stay():
    assert visible("a\n\tb\x1b\r", keep="\n\t") == "a\n\tb\\x1b\\x0d"
    assert str(SettingError("one\ntwo\x1b")) == "one\ntwo\\x1b"


def test_a_long_message_loses_its_middle():
    assert len(one_line(UserError("x" * 5_000_000))) == LONGEST_LINE
    assert len(str(RecordError("x" * 5_000_000))) == LONGEST_MESSAGE
    assert shortened("abcdefghijklmnopqrstuvwxyz", 12) == "abcdefgh … z" and shortened("abc", 3) == "abc"


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
def test_what_is_not_a_text_file_is_refused_at_once(tmp_path, make, words):
    path = tmp_path / "config.json"
    make(path)
    messages = []

    def read_all():
        for read, kind in (
            (read_text, UserError),
            (read_object, UserError),
            (lambda p, _: load_config(p), ConfigError),
        ):
            with pytest.raises(kind) as caught:
                read(path, kind)
            messages.append(str(caught.value))

    thread = threading.Thread(target=read_all, daemon=True)  # so that a hang fails the test instead of blocking it
    thread.start()
    thread.join(20)
    assert len(messages) == 3 and all(text.startswith(f"{path}: ") for text in messages)
    assert all(text.endswith(words) for text in messages[:2])


def test_a_file_of_the_maximum_size_is_read(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b" " * (LARGEST_TEXT - 2) + b"{}")
    assert read_object(path, UserError) == {}
    path.write_bytes(b"")
    assert read_text(path, UserError) == ""
