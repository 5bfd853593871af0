"""make download, against both hubs' stand-ins on loopback: what bears the model's name is whole, what was stopped goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_cases import write_folder
from stand_in_hub import LARGE, MODEL, StandIn, serving

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
    """A model of several files, and beside them what nobody needs."""
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
    """The hub stands still by then, so that nothing can pass."""
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


def the_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@SOURCES
def test_all_that_is_needed_comes_and_nothing_else(hub, original, source, capsys):
    assert run(source) == 0
    assert contents(TARGET) == needed(original) and sorted(TARGET.parent.iterdir()) == [TARGET]
    out, err = capsys.readouterr()
    total = sum(map(len, needed(original).values()))
    assert f"{TARGET}: {len(needed(original))} files, {total:,} bytes, all as 127.0.0.1" in out and not err
    assert sorted(name for name, *_ in hub.asked) == sorted(needed(original))
    assert {len(c) >= LARGE for c in needed(original).values()} == {
        True,
        False,
    }  # both kinds of checksum, both ways of sending


@SOURCES
def test_again_it_is_compared(hub, original, source, capsys):
    run(source)
    asked = len(hub.asked)
    assert run(source) == 0 and "is there already" in capsys.readouterr().out and len(hub.asked) == asked
    name, content = largest(original)
    (TARGET / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (TARGET / "tokenizer.json").unlink()
    assert run(source) == 1
    line = the_line(capsys)
    assert f"{name} is another" in line and "tokenizer.json is 0 bytes of 2" in line and f"or to {BESIDE}" in line
    TARGET.rename(BESIDE)  # as the line says
    assert run(source) == 0
    assert sorted(name for name, *_ in hub.asked[asked:]) == sorted([name, "tokenizer.json"])
    assert contents(TARGET) == needed(original)


@SOURCES
def test_connections_that_end_are_taken_up(hub, original, source):
    """Each time from where it was, within one run; an answer of 503 in between is asked again."""
    name, content = largest(original)
    hub.cut[name], hub.refuse[name] = [1000, 0, 5000, 1], [503, 429]
    assert run(source) == 0
    ranges = [r for n, r, _ in hub.asked if n == name]
    assert ranges == [None, None, None, "bytes=1000-", "bytes=1000-", "bytes=6000-", "bytes=6001-"]
    assert hub.sent[name] == len(content) and contents(TARGET) == needed(original)


@SOURCES
def test_a_hub_without_ranges(hub, original, source):
    name, content = largest(original)
    hub.cut[name], hub.no_range = [7000], True
    assert run(source) == 0 and hub.sent[name] == 7000 + len(content)
    assert contents(TARGET) == needed(original)


@SOURCES
def test_killed_in_the_middle_it_goes_on(hub, original, source):
    """kill -9 while the hub stands still: no folder bears the name; the next run asks for the rest, byte for byte."""
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
    assert hub.sent[name] - sent[name] == len(content) - half  # nothing came twice
    assert contents(TARGET) == needed(original)


@SOURCES
def test_what_is_damaged_on_the_way_is_not_taken(hub, original, source, capsys):
    name, _ = largest(original)
    hub.corrupt[name] = 1
    assert run(source) == 1
    assert f"{name}: what 127.0.0.1" in (line := the_line(capsys)) and "has not the checksum" in line
    assert not TARGET.exists() and not (BESIDE / name).exists()
    (BESIDE / name).write_bytes(b"of another day")  # what an earlier run left is of another state: fetched anew
    (BESIDE / "old.json").write_text("{}")
    assert run(source) == 0 and contents(TARGET) == needed(original)


@SOURCES
def test_without_checksums_nothing_is_taken_from_an_earlier_download_and_the_message_says_so(
    hub, original, source, capsys
):
    hub.without_checksums = True
    name, content = largest(original)
    BESIDE.mkdir(parents=True)
    (BESIDE / name).write_bytes(b"an older revision"[: len(content) // 2])
    assert run(source) == 0 and contents(TARGET) == needed(original)
    files = len(needed(original))
    assert f"but {files} without a checksum there are compared by size alone" in capsys.readouterr().out


def test_a_link_as_the_target_is_followed(hub, original, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/model")
    assert run("hf", "--out", "link") == 0
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "disk/model") == needed(original)


@SOURCES
def test_without_a_network(hub, source, capsys, monkeypatch):
    for name in ("HF_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    assert run(source) == 1
    line = the_line(capsys)
    assert "127.0.0.1:9 cannot be reached: Connection refused" in line
    assert f"safetensors into {TARGET} by hand" in line
    assert not TARGET.parent.exists()


def test_a_hub_that_goes_away(hub, original, capsys):
    name, _ = largest(original)
    hub.cut[name], hub.refuse[name] = [], [500] * 20
    assert run("hf") == 1
    assert f"brings no more of {name}, after 0 of" in (line := the_line(capsys))
    assert "answers 500" in line and "the same command goes on from there" in line
    assert not TARGET.exists() and len(hub.refuse[name]) == 20 - command.TRIES


@pytest.mark.parametrize(("source", "variable"), [("hf", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")])
def test_the_token_is_for_the_hub_alone(hub, original, source, variable, capsys, monkeypatch):
    """From the environment, never printed, and not sent on to the store."""
    hub.token = "hf_secret123"
    assert run(source) == 1
    assert f"needs a token that may read it ({variable} in the environment)" in the_line(capsys)
    monkeypatch.setenv(variable, "hf_wrong456")
    assert run(source) == 1
    assert f"({variable} in the environment is not enough)" in (line := the_line(capsys)) and "wrong456" not in line
    monkeypatch.setenv(variable, "hf_wrong\n456")
    assert run(source) == 1 and "wrong" not in the_line(capsys)
    monkeypatch.setenv(variable, hub.token)
    assert run(source) == 0
    assert "secret123" not in "".join(capsys.readouterr())
    for name, _, authorization in hub.asked:
        elsewhere = source == "hf" and len(needed(original)[name]) >= LARGE
        assert authorization == (None if elsewhere else f"Bearer {hub.token}"), name


def test_mistakes(hub, capsys, monkeypatch):
    for arguments, words in (
        (["nobody/nothing"], "127.0.0.1"),
        (["Qwen/Qwen3.5-tiny", "--source", "hf", "--out", "/proc/1/model"], "/proc/1"),
    ):
        assert command.main(arguments) == 1
        assert words in the_line(capsys)
    for arguments in (["runs/tiny/hf"], ["../x"], ["a"], ["a/b", "--source", "github"]):
        with pytest.raises(SystemExit) as end:
            command.main(arguments)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1, err
    monkeypatch.setenv("HF_ENDPOINT", "ftp://somewhere")
    assert run("hf") == 1 and "ftp://somewhere: not the address of a hub" in the_line(capsys)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@somewhere?token=secret")
    assert run("hf") == 1 and "secret" not in (line := the_line(capsys)) and "somewhere with more" in line


def test_another_model_is_left_after_its_config(hub, original, capsys):
    hub.extra = {"config.json": b'{"model_type": "llama"}'}
    assert run("hf") == 1
    assert "model_type 'llama' is not one of qwen3_5, qwen3_5_moe" in the_line(capsys)
    assert {name for name, *_ in hub.asked} == {"config.json"} and not BESIDE.exists()


def test_a_full_disk_is_seen_before(hub, capsys, monkeypatch):
    monkeypatch.setattr(command, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert run("hf") == 1
    assert "bytes are to come, and 1,000 are free on that disk" in the_line(capsys)
    assert not hub.asked


def test_names_that_lead_out_of_the_folder(hub, capsys):
    hub.extra = {"../../evil.json": b"{}"}
    assert run("hf") == 1 and "'../../evil.json', which lies outside" in the_line(capsys)
    for name in ("/etc/x.json", "a/../../b.json", "a\\b.json", "a\0.json"):
        with pytest.raises(DownloadError):
            is_needed(name)


def test_a_list_with_a_name_twice(hub, capsys):
    hub.names = lambda: [*StandIn.names(hub), "config.json"]
    assert run("hf") == 1 and "has config.json twice" in the_line(capsys)


def test_an_index_whose_files_are_not_there(hub, original, capsys):
    """The hub's own state is not whole: nothing bears the name."""
    name, _ = largest(original)
    hub.names = lambda: [n for n in StandIn.names(hub) if n != name]
    assert run("modelscope") == 1
    assert f"1 of {len(list(original.glob('*.safetensors')))} weight files missing: {name}" in the_line(capsys)
    assert not TARGET.exists()


def test_stopped_by_hand(hub, original):
    """Ctrl-C while files come: one line, exit code 130, and what has come stays."""
    name, content = largest(original)
    hub.hold[name] = 1000
    process = start("hf")
    wait_until(process, lambda: _size(BESIDE / name) == 1000)
    hub.refuse[name] = [503] * 20  # no more until it has seen the signal, however late that is
    process.send_signal(signal.SIGINT)
    hub.released.set()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err == "stopped; the same command goes on from there\n", out + err
    assert not TARGET.exists() and 1000 <= _size(BESIDE / name) < len(content)


def test_the_stand_in_is_as_the_library_knows_the_hub(hub, original):
    """huggingface_hub reads the same names, sizes and checksums from it as we do."""
    code = f"""
from huggingface_hub import HfApi
for s in HfApi().model_info({MODEL!r}, revision="main", files_metadata=True).siblings:
    print(s.rfilename, s.size, s.lfs.sha256 if s.lfs else s.blob_id, sep="|")
"""
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    theirs = {line for line in done.stdout.splitlines() if is_needed(line.split("|")[0])}
    ours = {f"{file.name}|{file.size}|{file.checksum[1]}" for file in HUBS["hf"]().files(MODEL)}
    assert ours == theirs and len(ours) == len(needed(original))


def test_two_at_once(hub, capsys, monkeypatch):
    """The second says so, and leaves the first alone."""
    import qwen35.checkpoint.lock as lock

    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 0.1)
    code = "import sys, time; from pathlib import Path; from qwen35.checkpoint.lock import holding\n"
    code += "with holding(Path(sys.argv[1])):\n    print(1, flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code, BESIDE.absolute()], cwd=ROOT, stdout=subprocess.PIPE)
    assert first.stdout.readline()
    assert run("hf") == 1
    assert f"is in use by another job (process {first.pid}" in the_line(capsys)
    first.kill()
    first.communicate()


def test_the_hubs_own_addresses(monkeypatch):
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
