"""Lines of the log: what they look like on which rank, and where they go."""

import os
import re
import signal
import subprocess
import sys

import pytest
from plain import PREFIX, plain
from tqdm import tqdm

from qwen35.errors import SettingError
from qwen35.log import log_at_once, log_to, log_warnings, logger, set_up_logging

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def log_all() -> None:
    logger.debug("a detail")
    logger.info("loss\nand\x1b more")
    logger.warning("odd\nindeed")


@pytest.mark.parametrize(
    ("rank", "stream", "lines"),
    [
        (0, "out", ["loss", r"and\\x1b more", "rank 0 WARNING: odd", "indeed"]),
        (3, "out", ["rank 3 WARNING: odd", "indeed"]),
        (None, "err", ["loss", r"and\\x1b more", "WARNING: odd", "indeed"]),
    ],
)
def test_a_line_has_the_time_and_rank_and_level_where_several_ranks_speak(rank, stream, lines, capsys):
    set_up_logging(rank)
    log_all()
    printed = capsys.readouterr()
    text = getattr(printed, stream)
    assert re.fullmatch("".join(f"{TIME}{line}\n" for line in lines), text), text
    assert printed.out + printed.err == text
    assert len(PREFIX.findall(text)) == len(lines) and "odd\nindeed\n" in plain(text)


@pytest.mark.parametrize(("level", "rank"), [("WARNING", 0), ("WARNING", 3), ("INFO", 3)])
def test_what_all_ranks_would_warn_of_is_told_once_at_the_level_of_warnings(level, rank, capsys, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", level)
    set_up_logging(rank)
    log_warnings([])
    log_warnings(["3 records", "are left out"])
    assert plain(capsys.readouterr().out) == ("3 records\nare left out\n" if rank == 0 else "")


def test_a_process_that_is_killed_as_it_logs_stops_no_other(capsys):
    """A rank's loader workers are forked, and whatever kills one may do so in a line's middle."""
    set_up_logging(0)
    if not (child := os.fork()):
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert tqdm.get_lock().acquire(blocking=False)
    tqdm.get_lock().release()
    logger.info("goes on")
    assert "goes on" in capsys.readouterr().out


@pytest.mark.parametrize(("level", "count"), [("DEBUG", 5), ("INFO", 4), ("WARNING", 2), ("ERROR", 0), ("", 4)])
def test_log_level_selects_the_lines(level, count, monkeypatch, capsys):
    monkeypatch.setenv("LOG_LEVEL", level)
    set_up_logging(0)
    log_all()
    assert capsys.readouterr().out.count("\n") == count


def test_an_unknown_log_level_is_refused(monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "loud")
    before = logger.level
    with pytest.raises(SettingError, match=r"^LOG_LEVEL=loud: is none of DEBUG, INFO, WARNING, ERROR$"):
        set_up_logging(0)
    assert logger.level == before


def test_the_file_has_all_lines_of_rank_0_and_is_appended_to(tmp_path, capsys):
    file = tmp_path / "train.log"
    for _ in range(2):
        set_up_logging(0)
        logger.info("before there is a folder")
        log_to(file)
        logger.info("a step beside its progress bar", extra={"file_only": True})
    assert plain(file.read_text()) == "before there is a folder\na step beside its progress bar\n" * 2
    assert plain(capsys.readouterr().out) == "before there is a folder\n" * 2
    set_up_logging(1)
    log_to(file)
    logger.warning("from another rank")
    assert "another" not in file.read_text()


def test_a_file_that_cannot_be_written_is_named_once_and_the_run_continues(tmp_path, capsys):
    set_up_logging(0)
    log_to(tmp_path)
    logger.info("a step")
    words = f"{tmp_path}: cannot be written: Is a directory; the run continues without it"
    assert plain(capsys.readouterr().out) == f"{words}\na step\n"


def test_a_signal_handler_logs_without_the_streams(capfd):
    log_at_once("stopping")
    assert re.fullmatch(f"{TIME}stopping\n", capfd.readouterr().err)


def test_logging_survives_closed_streams():
    program = (
        "from qwen35.log import *; set_up_logging(0); logger.warning('x'); log_at_once('y'); open(3, 'w').write('done')"
    )
    reader, writer = os.pipe()
    command = ["bash", "-c", f'exec "{sys.executable}" -c "$0" 3>&{writer} >&- 2>&-', program]
    assert subprocess.run(command, pass_fds=[writer], check=False).returncode == 0
    assert os.read(reader, 10) == b"done"
