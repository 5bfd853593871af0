"""The lock of Triton's cache, with a stand-in for triton-ascend 3.2.0's unlocked writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35.triton_cache import LOCK, CacheError, cache_folder, compiling, unfit

# like make_npu_launcher_stub in its backends/ascend/driver.py, which keeps either existing file
COMPILER = """
import contextlib, sys, time
from pathlib import Path
from qwen35.triton_cache import compiling

folder, is_locked = Path(sys.argv[1]), sys.argv[2] == "locked"
with compiling(folder, lambda process: print("waits for", process, flush=True)) if is_locked else contextlib.nullcontext():
    header, made = folder / "a hash/precompiled.h", folder / "a hash/precompiled.h.gch"
    if not header.exists() and not made.exists():
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("#include")
        with made.open("w") as file:
            print("half", file=file, end="", flush=True)
            print("is writing", flush=True)
            while not (folder / "go on").exists():
                time.sleep(0.01)
            print(" and half", file=file, end="")
    found = made.read_text()
sys.exit(0 if found == "half and half" else "found " + found)
"""


def start(folder: Path, how: str = "locked") -> subprocess.Popen:
    command = [sys.executable, "-c", COMPILER, str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line(process: subprocess.Popen) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_processes_compile_one_after_another(tmp_path):
    first = start(tmp_path)
    assert line(first) == "is writing"
    others = [start(tmp_path) for _ in range(4)]
    assert [line(process) for process in others] == [f"waits for {first.pid}"] * 4
    (tmp_path / "go on").touch()
    for process in (first, *others):
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    assert (tmp_path / LOCK).read_text() == ""


def test_without_the_lock_half_a_header_is_read(tmp_path):
    first = start(tmp_path, "unlocked")
    assert line(first) == "is writing"
    second = start(tmp_path, "unlocked")
    _, err = second.communicate(timeout=600)
    (tmp_path / "go on").touch()
    first.communicate(timeout=600)
    assert (first.returncode, second.returncode, err) == (0, 1, "found half\n")


def test_entry_of_a_killed_process_is_made_again(tmp_path):
    killed = start(tmp_path)
    assert line(killed) == "is writing"
    killed.kill()
    killed.communicate()
    (tmp_path / "another").mkdir()
    (tmp_path / "another/kernel.so").touch()
    assert (tmp_path / "a hash/precompiled.h.gch").read_text() == "half"
    (tmp_path / "go on").touch()
    later = start(tmp_path)
    _, err = later.communicate(timeout=600)
    assert later.returncode == 0, err
    assert (tmp_path / "another/kernel.so").exists()


def test_complete_entry_is_kept(tmp_path):
    (tmp_path / "go on").touch()
    assert start(tmp_path).wait(600) == 0
    made = (tmp_path / "a hash/precompiled.h.gch").stat().st_mtime_ns
    assert start(tmp_path).wait(600) == 0
    assert (tmp_path / "a hash/precompiled.h.gch").stat().st_mtime_ns == made


def test_cache_must_belong_to_this_user_alone(tmp_path, monkeypatch):
    made = tmp_path / "above/cache"
    with compiling(made, lambda who: None):
        assert made.stat().st_mode & 0o777 == 0o700
        assert (made / LOCK).read_text().strip() == str(os.getpid())
    made.chmod(0o770)
    assert unfit(made) == "others may write there: its mode is 770"
    made.chmod(0o750)
    (tmp_path / "link").symlink_to(made)
    assert unfit(made) is None and unfit(tmp_path / "link") is None and unfit(tmp_path / "none") is None
    (tmp_path / "file").touch()
    assert unfit(tmp_path / "file") == "it is not a folder"
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert unfit(made) == f"it belongs to user {uid}, this process to {uid + 1}"
    refused = f"^TRITON_CACHE_DIR={made}: .* it belongs to user {uid}, .*; name another folder$"
    with pytest.raises(CacheError, match=refused), compiling(made, lambda who: None):
        raise AssertionError("not reached")


def test_cache_folder_follows_the_environment(tmp_path):
    assert cache_folder({"TRITON_CACHE_DIR": "/a b"}) == Path("/a b")
    assert cache_folder({"TRITON_CACHE_DIR": " ", "TRITON_HOME": str(tmp_path)}) == tmp_path / ".triton/cache"
    assert cache_folder({}) == Path.home() / ".triton/cache"


def test_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def refuse(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("qwen35.triton_cache.fcntl.flock", refuse)
    with pytest.raises(CacheError, match="has no locks"), compiling(tmp_path / "cache", lambda who: None):
        raise AssertionError("not reached")
