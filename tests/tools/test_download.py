"""make download against stand-ins for both hubs: model folders are complete, downloads resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_cases import write_folder
from huggingface_hub import constants
from stand_in_hub import LARGE, MODEL, REVISION, StandIn, serving

import qwen35.tools.download as command
from qwen35.tools.hub import HUBS, DownloadError, is_needed

ROOT = Path(__file__).parents[2]
SOURCES = pytest.mark.parametrize("source", ["hf", "modelscope"])
OTHERS = (
    ".gitattributes",
    "README.md",
    "LICENSE",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "a/weights.pth",
    ".x/y.json",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A model of several files, beside others that are not needed."""
    folder = write_folder(tmp_path_factory.mktemp("hub") / "model", shard_size=250_000)
    for path in folder.glob(".*"):
        path.unlink()
    for name, text in (
        ("tokenizer.json", "{}"),
        ("merges.txt", "a b\n" * 9),
        ("chat_template.jinja", "{{ x }}"),
        ("sub/a b.json", "1"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 100)
    return folder


@pytest.fixture
def hub(original, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "http_proxy", "https_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE")  # which tests/conftest.py sets
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    monkeypatch.setattr(command, "PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    with serving(original) as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", stand_in.address)
        yield stand_in


def run(source: str, *options: str) -> int:
    return command.main([MODEL, "--source", source, *options])


def start(source: str) -> subprocess.Popen:
    options = ["--source", source, "--out", str(TARGET.absolute())]
    command = [sys.executable, "-m", "qwen35.tools.download", MODEL, *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(process: subprocess.Popen, condition) -> None:
    """The hub holds its answer at that point, so the condition cannot be missed."""
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


TARGET = Path("ckpt/hf_path/Qwen3.5-tiny")
BESIDE = Path("ckpt/hf_path/.Qwen3.5-tiny.download")


def needed(original: Path) -> dict[str, bytes]:
    paths = {p.relative_to(original).as_posix(): p for p in original.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if name not in OTHERS}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def largest(original: Path) -> tuple[str, bytes]:
    return max(needed(original).items(), key=lambda item: len(item[1]))


def error_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@SOURCES
def test_only_needed_files_are_downloaded(hub, original, source, capsys):
    assert run(source) == 0
    assert contents(TARGET) == needed(original) and sorted(TARGET.parent.iterdir()) == [TARGET]
    out, err = capsys.readouterr()
    total = sum(map(len, needed(original).values()))
    revision = REVISION if source == "hf" else "master"
    assert f"{MODEL}, revision {revision}, from 127.0.0.1" in out and not err
    expected = f"{TARGET}: {len(needed(original))} files, {total:,} bytes, all as in revision {revision} on 127.0.0.1"
    assert expected in out
    assert sorted(name for name, *_ in hub.asked) == sorted(needed(original))
    assert {len(c) >= LARGE for c in needed(original).values()} == {
        True,
        False,
    }  # both kinds of checksum, both ways of sending


@SOURCES
def test_existing_folder_is_compared(hub, original, source, capsys):
    run(source)
    asked = len(hub.asked)
    assert run(source) == 0 and "exists already" in capsys.readouterr().out and len(hub.asked) == asked
    name, content = largest(original)
    (TARGET / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (TARGET / "tokenizer.json").unlink()
    assert run(source) == 1
    line = error_line(capsys)
    assert f"{name} differs" in line and "tokenizer.json is 0 bytes of 2" in line and str(BESIDE) in line
    TARGET.rename(BESIDE)  # as the message says
    assert run(source) == 0
    assert sorted(name for name, *_ in hub.asked[asked:]) == sorted([name, "tokenizer.json"])
    assert contents(TARGET) == needed(original)


@SOURCES
def test_broken_connections_are_resumed(hub, original, source):
    """Within one run, each from where it stopped; an answer of 503 is retried."""
    name, content = largest(original)
    hub.cut[name], hub.refuse[name] = [1000, 0, 5000, 1], [503, 429]
    assert run(source) == 0
    ranges = [r for n, r, _ in hub.asked if n == name]
    assert ranges == [None, None, None, "bytes=1000-", "bytes=1000-", "bytes=6000-", "bytes=6001-"]
    assert hub.sent[name] == len(content) and contents(TARGET) == needed(original)


@SOURCES
def test_hub_without_ranges_sends_the_whole_file(hub, original, source):
    name, content = largest(original)
    hub.cut[name], hub.no_range = [7000], True
    assert run(source) == 0 and hub.sent[name] == 7000 + len(content)
    assert contents(TARGET) == needed(original)


@SOURCES
def test_killed_download_is_resumed(hub, original, source):
    """After kill -9 there is no model folder; the next run requests only the missing bytes."""
    name, content = largest(original)
    half = len(content) // 2
    hub.hold[name] = half
    process = start(source)
    others = [n for n in needed(original) if n != name]
    wait_until(process, lambda: _size(BESIDE / name) == half and all((BESIDE / n).is_file() for n in others))
    process.kill()
    process.communicate()
    assert not TARGET.exists()
    hub.released.set()
    del hub.hold[name]
    sent = dict(hub.sent)
    assert run(source) == 0
    assert hub.sent[name] - sent[name] == len(content) - half  # nothing is sent twice
    assert contents(TARGET) == needed(original)


@SOURCES
def test_wrong_checksum_is_refused(hub, original, source, capsys):
    name, _ = largest(original)
    hub.corrupt[name] = 1
    assert run(source) == 1
    assert f"{name}: what 127.0.0.1" in (line := error_line(capsys)) and "checksum" in line
    assert not TARGET.exists() and not (BESIDE / name).exists()
    (BESIDE / name).write_bytes(b"of another day")  # of an earlier revision: downloaded anew
    (BESIDE / "old.json").write_text("{}")
    assert run(source) == 0 and contents(TARGET) == needed(original)


@SOURCES
def test_without_checksums_nothing_is_reused(hub, original, source, capsys):
    hub.without_checksums = True
    name, content = largest(original)
    BESIDE.mkdir(parents=True)
    (BESIDE / name).write_bytes(b"an older revision"[: len(content) // 2])
    assert run(source) == 0 and contents(TARGET) == needed(original)
    files = len(needed(original))
    assert f"but {files} without a checksum there are compared by size alone" in capsys.readouterr().out


def test_symlink_as_the_target_is_followed(hub, original, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/model")
    assert run("hf", "--out", "link") == 0
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "disk/model") == needed(original)


@SOURCES
def test_unreachable_hub(hub, source, capsys, monkeypatch):
    for name in ("HF_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    assert run(source) == 1
    line = error_line(capsys)
    assert "127.0.0.1:9 cannot be reached: " in line and "Connection refused" in line
    assert f"safetensors into {TARGET} by hand" in line
    assert not TARGET.parent.exists()


@SOURCES
def test_offline_nothing_passes_for_the_model(hub, original, source, capsys, monkeypatch):
    """Neither a part of it, nor a whole folder: it was not compared."""
    for folder, files in ((BESIDE, ["config.json"]), (TARGET, ["config.json"]), (TARGET, list(needed(original)))):
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(needed(original)[name])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert run(source) == 1
        line = error_line(capsys)
        assert "cannot be reached: HF_HUB_OFFLINE is set" in line
        assert ("was not compared with the hub" in line) == TARGET.exists() == (folder == TARGET)
    assert not hub.asked and not hub.listed


def test_a_revision_is_pinned_to_its_commit(hub, original, capsys):
    assert run("hf", "--revision", REVISION) == 0 and contents(TARGET) == needed(original)
    assert f"all as in revision {REVISION} on" in capsys.readouterr().out
    assert run("hf", "--revision", "v0") == 1 and "no such model, revision or file" in error_line(capsys)


def test_the_token_of_a_login_is_used(hub, original, tmp_path):
    hub.token = "hf_secret123"
    (tmp_path / "login").write_text(hub.token)
    assert run("hf") == 0 and contents(TARGET) == needed(original)


def test_hub_that_fails_during_the_download(hub, original, capsys):
    name, _ = largest(original)
    hub.cut[name], hub.refuse[name] = [], [500] * 20
    assert run("hf") == 1
    assert f"{name}, after 0 of" in (line := error_line(capsys))
    assert "answers 500" in line and "the same command goes on from there" in line
    assert not TARGET.exists() and len(hub.refuse[name]) == 20 - command.TRIES


@pytest.mark.parametrize(("source", "variable"), [("hf", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")])
def test_token_is_sent_to_the_hub_alone(hub, original, source, variable, capsys, monkeypatch):
    """It comes from the environment, is never printed, and not sent to the storage."""
    hub.token = "hf_secret123"
    assert run(source) == 1
    assert f"needs a token that may read it ({variable} in the environment)" in error_line(capsys)
    monkeypatch.setenv(variable, "hf_wrong456")
    assert run(source) == 1
    assert f"({variable} in the environment is not enough)" in (line := error_line(capsys)) and "wrong456" not in line
    monkeypatch.setenv(variable, "hf_wrong\n456")
    assert run(source) == 1 and "wrong" not in error_line(capsys)
    monkeypatch.setenv(variable, hub.token)
    assert run(source) == 0
    assert "secret123" not in "".join(capsys.readouterr())
    for name, _, authorization in hub.asked:
        elsewhere = source == "hf" and len(needed(original)[name]) >= LARGE
        assert authorization == (None if elsewhere else f"Bearer {hub.token}"), name


def test_wrong_arguments_and_addresses_are_refused(hub, capsys, monkeypatch):
    for arguments, expected in (
        (["nobody/nothing"], "127.0.0.1"),
        (["Qwen/Qwen3.5-tiny", "--source", "hf", "--out", "/proc/1/model"], "/proc/1"),
    ):
        assert command.main(arguments) == 1
        assert expected in error_line(capsys)
    for arguments in (["runs/tiny/hf"], ["../x"], ["a"], ["a/b", "--source", "github"]):
        with pytest.raises(SystemExit) as end:
            command.main(arguments)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1, err
    monkeypatch.setenv("HF_ENDPOINT", "ftp://somewhere")
    assert run("hf") == 1 and "ftp://somewhere: not the address of a hub" in error_line(capsys)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@somewhere?token=secret")
    assert run("hf") == 1 and "secret" not in (line := error_line(capsys)) and "somewhere with more" in line


def test_a_name_of_the_family_alone_is_its_publishers(hub, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "download", lambda model, _, folder, revision: asked.append((model, folder)) or "")
    for name in ("Qwen3.5-4B-Base", "Qwen3.6-35B-A3B", "Qwen3.8-27B", "Qwen3.8-2.4T-A95B"):
        assert command.main([name]) == 0
        assert asked.pop() == (f"Qwen/{name}", Path("ckpt/hf_path") / name)
    for name in ("Qwen3-8B", "Qwen3.7-27B", "Qwen3.8-27B/x/y"):
        with pytest.raises(SystemExit):
            command.main([name])


def test_unsupported_model_is_refused_after_its_config(hub, original, capsys):
    hub.extra = {"config.json": b'{"model_type": "llama"}'}
    assert run("hf") == 1
    assert "model_type 'llama' is not one of qwen3_5, qwen3_5_moe" in error_line(capsys)
    assert {name for name, *_ in hub.asked} == {"config.json"} and not BESIDE.exists()


def test_full_disk_is_refused_before_the_download(hub, capsys, monkeypatch):
    monkeypatch.setattr(command, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert run("hf") == 1
    assert " 1,000 are free on that disk" in error_line(capsys)
    assert not hub.asked


def test_names_outside_of_the_folder_are_refused(hub, capsys):
    hub.extra = {"../../evil.json": b"{}"}
    assert run("hf") == 1 and "'../../evil.json', which lies outside" in error_line(capsys)
    for name in ("/etc/x.json", "a/../../b.json", "a\\b.json", "a\0.json"):
        with pytest.raises(DownloadError):
            is_needed(name)


def test_list_with_a_repeated_name_is_refused(hub, capsys):
    hub.names = lambda: [*StandIn.names(hub), "config.json"]
    assert run("hf") == 1 and "config.json twice" in error_line(capsys)


def test_index_with_missing_files_is_refused(hub, original, capsys):
    """The model on the hub is incomplete, so no model folder is made."""
    name, _ = largest(original)
    hub.names = lambda: [n for n in StandIn.names(hub) if n != name]
    assert run("modelscope") == 1
    assert f"1 of {len(list(original.glob('*.safetensors')))} weight files missing: {name}" in error_line(capsys)
    assert not TARGET.exists()


def test_ctrl_c_keeps_what_was_downloaded(hub, original):
    """One line, exit status 130, and the partial file stays."""
    name, content = largest(original)
    hub.hold[name] = 1000
    process = start("hf")
    wait_until(process, lambda: _size(BESIDE / name) == 1000)
    hub.refuse[name] = [503] * 20  # nothing more is sent, however late the signal is handled
    process.send_signal(signal.SIGINT)
    hub.released.set()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err == "stopped; the same command goes on from there\n", out + err
    assert not TARGET.exists() and 1000 <= _size(BESIDE / name) < len(content)


def test_huggingface_hub_downloads_the_same_from_the_stand_in(hub, original, tmp_path):
    """So the stand-in speaks as the hub does, and we download what its own client does."""
    code = f"""
from huggingface_hub import snapshot_download
snapshot_download({MODEL!r}, local_dir={str(tmp_path / "theirs")!r}, allow_patterns={list(needed(original))})
"""
    home = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code], env=home, check=True)
    theirs = {name: content for name, content in contents(tmp_path / "theirs").items() if not name.startswith(".cache")}
    assert run("hf") == 0 and contents(TARGET) == needed(original) == theirs


def test_second_download_of_a_model_is_refused(hub, capsys, monkeypatch):
    """The message names the process of the first."""
    import qwen35.checkpoint.lock as lock

    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 0.1)
    code = "import sys, time; from pathlib import Path; from qwen35.checkpoint.lock import holding\n"
    code += "with holding(Path(sys.argv[1])):\n    print(1, flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code, BESIDE.absolute()], cwd=ROOT, stdout=subprocess.PIPE)
    assert first.stdout.readline()
    assert run("hf") == 1
    assert f"is in use by another job (process {first.pid}" in error_line(capsys)
    first.kill()
    first.communicate()


def test_addresses_of_the_hubs(monkeypatch):
    code = "from qwen35.tools.hub import HUBS; print(*(hub().address for hub in HUBS.values()))"
    names = ("HF_ENDPOINT", "MODELSCOPE_DOMAIN")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert [address.split("://")[0] for address in done.stdout.split()] == ["https", "https"]
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "www.other.example")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hf/")
    assert (
        HUBS["modelscope"]().address == "https://www.other.example"
        and HUBS["hf"]().address == "https://mirror.example/hf"
    )
