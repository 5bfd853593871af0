"""What foreign text may do to a message: nothing that a terminal would act on, hide or take for another line.

And files of text that are none: nothing is read that might never end, or that cannot be what it should.
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
def test_what_a_terminal_would_act_on_or_hide_is_shown_by_its_code(text, shown, capsys):
    assert visible(f"a{text}b") == f"a{shown}b"
    for error in (UserError(f"a{text}b"), RecordError(f"a{text}b"), OSError(2, "no such file", f"a{text}b")):
        assert complain(error) == 1
        printed = capsys.readouterr().err
        assert f"a{shown}b" in printed and printed.count("\n") == 1 and printed[:-1].isprintable()


@given(st.text())
def test_any_text_can_be_printed_and_is_one_line(text):
    shown = visible(text)
    shown.encode()
    assert len(f"|{shown}|".splitlines()) == 1
    categories = {unicodedata.category(c) for c in shown}
    assert not categories & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize("text", ["plain", "é 你好 \u3000 عربي", "a b"])
def test_writing_of_any_language_stays(text):
    assert visible(text) == text


def test_half_a_surrogate_pair_can_be_printed(capsys):
    complain(RecordError("id \ud83d"))
    assert capsys.readouterr().err == "error: id \\ud83d\n"


def test_what_may_stay():
    assert visible("a\n\tb\x1b\r", keep="\n\t") == "a\n\tb\\x1b\\x0d"
    assert str(SettingError("one\ntwo\x1b")) == "one\ntwo\\x1b"


def test_a_message_is_never_longer_than_a_screen():
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
