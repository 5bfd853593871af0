"""What foreign text may do to a message: nothing that a terminal would act on, hide or take for another line."""

import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35.data.record import LONGEST_MESSAGE, RecordError
from qwen35.errors import LONGEST_LINE, SettingError, UserError, complain, one_line, read_object, shortened, visible

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


def test_a_pipe_or_a_device_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("config.json", "zero"):
        with pytest.raises(SettingError, match=f"{name}: is a pipe or a device, not a file$"):
            read_object(tmp_path / name, SettingError)


def test_a_file_too_large_to_be_a_config(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 35)  # a hole: no disk is needed
    with pytest.raises(SettingError, match=r"config\.json: has 34,359,738,368 bytes, more than the 268,435,456 of"):
        read_object(tmp_path / "config.json", SettingError)
