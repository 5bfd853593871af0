"""Any bytes in any file are read or refused in one line: no traceback, hang or file elsewhere.

`python tests/checkpoint/test_hostile_files.py 100` tries 100 files of each kind, other ones each
time. Records and images are in tests/data/test_fuzz.py, .metadata is also in test_damage.py.
"""

import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import MemorySource, save_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tokenizer_fixture import make_model_folder

from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.checkpoint.dcp_folder import (
    LATEST,
    load_notes,
    manifest_content,
    read_file,
    resolve_load,
)
from qwen35.checkpoint.dcp_source import DCPSource, _from_json
from qwen35.checkpoint.dcp_write import write_release
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf import not_read
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.checkpoint.slices import TensorSlice
from qwen35.checkpoint.torch_archive import find_tensor
from qwen35.config.load import LONGEST_RECIPE, SettingError, load_settings
from qwen35.data.image_processor import ImageError, ImageProcessor, read_rgb
from qwen35.data.readers import read_values
from qwen35.data.style import thinks_by_default
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.errors import USER_ERRORS, one_line
from qwen35.inference.generation_config import read_generation_config
from qwen35.launch.hosts import read_hosts
from qwen35.model import load_config
from qwen35.training.metrics import RunError, read_metrics
from qwen35.training.plots import Curves, draw_loss
from qwen35.training.resume import repair_save_folder

EXAMPLES = 8  # of each kind, always the same
TIMEOUT = 30  # seconds for one file
TENSORS = {"a.weight": torch.arange(24.0).view(4, 6), "b": torch.arange(7).to(torch.bfloat16), "c": torch.zeros(0, 3)}
ASSETS = Path(__file__).parents[2] / "assets"
RECORD = [
    {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
]


def same(source) -> None:
    for name, spec in source.specs.items():
        values = source.read(name, TensorSlice.full(spec.shape))
        if name in TENSORS:  # verified or untouched: as written
            assert values.shape == TENSORS[name].shape and torch.equal(values, TENSORS[name])


def shapes(source) -> None:
    for name, spec in source.specs.items():
        assert source.read(name, TensorSlice.full(spec.shape)).shape == spec.shape


def settled(folder: Path) -> None:
    load_notes(folder, resolve_load(folder))
    repair_save_folder(folder)


def forged(folder: Path) -> Path:
    """Make the checksums those of the changed content."""
    manifest = next(folder.glob("*/complete.json"))
    content = json.loads(manifest.read_text())
    manifest.unlink()
    manifest.write_text(json.dumps(manifest_content(manifest.parent, content["step"], content["world_size"])))
    return folder


def resumed(folder: Path) -> None:
    model = torch.nn.Linear(3, 2)
    assert load_checkpoint(folder, model).step == 4


def weights(folder: Path) -> Path:
    save_file(TENSORS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    return folder / "model.safetensors"


def index(folder: Path) -> Path:
    weights(folder).rename(folder / "model-00001-of-00001.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors")})
    )
    return file


def small_file(name: str):
    def make(folder: Path) -> Path:
        make_model_folder(folder)
        shutil.copy(ASSETS / "configs/4B.json", folder / "config.json")
        values = {"bos_token_id": 1, "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7, "top_k": 20}
        (folder / "generation_config.json").write_text(json.dumps(values))
        return folder / name

    return make


def released(name: str):
    def make(folder: Path) -> Path:
        return write_release(MemorySource(TENSORS), folder) / name

    return make


def saved(name: str):
    def make(folder: Path) -> Path:
        save_checkpoint(folder, 4, torch.nn.Linear(3, 2), None, {"step": 4, "rng": torch.ones(3)}, {"x": (1, 2)})
        return folder / "iter_0000004" / name

    return make


def latest(folder: Path) -> Path:
    return saved("")(folder).parent / LATEST


def foreign(name: str):
    def make(folder: Path) -> Path:
        dcp.save({f"model.{key}": value for key, value in TENSORS.items()}, checkpoint_id=folder, no_dist=True)
        return folder / name

    return make


def written(name: str, content: bytes):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def picture(folder: Path) -> Path:
    Image.effect_noise((30, 20), 90).save(folder / "a.png")
    return folder / "a.png"


def seen(folder: Path) -> None:
    processor = ImageProcessor.from_folder(folder, 1024, 65536)
    Image.new("RGB", (50, 40)).save(folder / "plain.png")
    processor.patches(folder / "plain.png")


METRICS = b"".join(json.dumps({"step": n, "loss": 1.5, "lr": 0.1, "grad_norm": 1.0}).encode() + b"\n" for n in range(4))
KINDS = {  # kind -> function that makes the file in a folder, function that reads it
    "safetensors": (weights, lambda f: shapes(HFFolder(f))),
    "index": (index, lambda f: same(HFFolder(f))),
    "config": (small_file("config.json"), lambda f: (load_config(f), not_read(f))),
    "tokenizer": (small_file("tokenizer.json"), lambda f: ChatTokenizer(f).encode_text("Hello")),
    "tokenizer_config": (small_file("tokenizer_config.json"), ChatTokenizer),
    "chat_template": (small_file("chat_template.jinja"), thinks_by_default),
    "generation_config": (small_file("generation_config.json"), read_generation_config),
    "preprocessor_config": (small_file("preprocessor_config.json"), seen),
    "manifest": (released("complete.json"), lambda f: same(DCPSource(resolve_load(f)))),
    "tensors.json": (released("tensors.json"), lambda f: same(DCPSource(resolve_load(f)))),
    "distcp": (released("__0_0.distcp"), lambda f: same(DCPSource(resolve_load(f)))),
    "forged tensors.json": (released("tensors.json"), lambda f: shapes(DCPSource(resolve_load(forged(f))))),
    "forged extra": (saved("extra.json"), lambda f: resumed(forged(f))),
    "forged rank": (saved("rank_00000.json"), lambda f: resumed(forged(f))),
    "metadata": (foreign(".metadata"), lambda f: shapes(DCPSource(f))),
    "archive": (foreign("__0_0.distcp"), lambda f: shapes(DCPSource(f))),
    "extra": (saved("extra.json"), resumed),
    "rank": (saved("rank_00000.json"), resumed),
    "latest": (latest, settled),
    "metrics": (written("metrics.jsonl", METRICS), lambda f: read_metrics(f / "metrics.jsonl")),
    "recipe": (
        written("r.yaml", (ASSETS.parent / "configs/tiny.yaml").read_bytes()),
        lambda f: load_settings(f / "r.yaml"),
    ),
    "hosts": (
        written("hosts", b"a slots=8\nb@c:22 slots=8 addr=10.0.0.1  # x\n"),
        lambda f: read_hosts(f / "hosts"),
    ),
    "records": (written("r.json", json.dumps(RECORD).encode()), lambda f: list(read_values(f / "r.json"))),
    "image": (picture, lambda f: read_rgb(f / "a.png").load()),
}
VALUES = [
    None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "../../x", "/dev/zero", "\ud800", "\x1b[2J\u202e",
    [], {}, [[[]]], "x" * 3000, [0] * 3000, {"a": {"a": {}}},
]  # fmt: skip
PIECES = [
    b"[" * 20_000,
    b'{"a":' * 5_000,
    b"9" * 5000,
    b"\xff\xfe",
    b"\0" * 8,
    b"\xff" * 8,
    b'"',
    b"&a *a",
    b"../",
    b"-",
    b"e999",
]


def changed(content: bytes, data: st.DataObject) -> bytes:
    """A JSON value exchanged, or bytes truncated, changed, doubled, removed or inserted."""
    start = 8 if content[8:9] == b"{" else 0  # safetensors: the header keeps a matching length
    end = start + int.from_bytes(content[:8], "little") if start else len(content)
    try:
        tree = json.loads(content[start:end])
    except ValueError:
        tree = None
    if isinstance(tree, dict | list) and data.draw(st.booleans()):
        node = tree
        for _ in range(data.draw(st.integers(0, 6))):
            below = [v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, dict | list) and v]
            node = data.draw(st.sampled_from(below)) if below else node
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        node[key] = data.draw(st.sampled_from(VALUES))
        if isinstance(node, dict) and data.draw(st.booleans()):
            node[data.draw(st.sampled_from(["", "../x", "\x1b[2J", "model.a"]))] = node.pop(key)
        text = json.dumps(tree).encode()
        return (len(text).to_bytes(8, "little") + text if start else text) + content[end:]
    found = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(found)) | st.integers(0, min(end, len(found))))
        stop = place + data.draw(st.integers(0, 40))
        piece = data.draw(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=9))
        found[place:stop] = data.draw(st.sampled_from([piece, b"", found[place:stop] * 2, found[place:stop] + piece]))
    return bytes(found[: data.draw(st.integers(0, len(found)))] if data.draw(st.integers(0, 5)) == 0 else found)


@contextmanager
def at_most(seconds: float):
    """Fail if the block takes longer."""

    def fail(*_) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attack(kind: str, place: Path, examples: int) -> int:
    """Read changed files of one kind. Returns how many were refused."""
    make, read = KINDS[kind]
    (place / "good").mkdir()
    file = make(place / "good").relative_to(place / "good")
    read(shutil.copytree(place / "good", place / "first"))
    content, refused, is_series = (place / "good" / file).read_bytes(), [], examples != EXAMPLES
    names = {"good", "first", "now"}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=not is_series,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def once(data: st.DataObject) -> None:
        shutil.rmtree(place / "now", ignore_errors=True)
        shutil.copytree(place / "good", place / "now")
        (place / "now" / file).write_bytes(changed(content, data))
        try:
            with at_most(TIMEOUT):
                read(place / "now")
        except (*USER_ERRORS, ImageError) as error:
            line = one_line(error)
            assert line.isprintable() and line == line.encode().decode()
            refused.append(line)
        assert {path.name for path in place.iterdir()} <= names

    once()
    return len(refused)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("kind", KINDS)
def test_changed_file_is_read_or_refused(kind, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "place").mkdir()
    attack(kind, tmp_path / "place", EXAMPLES)
    assert not list((tmp_path / "cwd").iterdir())
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("cwd", "place")] == []


# -- single cases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "a: &a [x, x]\n"
            + "".join(
                f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
            ),
            r"line 2, column 8: \*a is an alias, which recipes do not have; write out what it stands for",
        ),
        ("training: &a\n  x: *a\n", r"line 2, column 6: \*a is an alias"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", r"line 3, column 7: \*a is an alias"),
        ("a: " + "x" * LONGEST_RECIPE, "1,048,579 characters, a recipe has at most 1,048,576; is it another file"),
        ("[" * 50_000, "is not YAML"),
    ],
    ids=["bomb", "itself", "merged", "long", "deep"],
)
def test_recipe_that_would_exhaust_memory_is_refused(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    with at_most(60), pytest.raises(SettingError, match=words):
        load_settings(tmp_path / "r.yaml")


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("kind", ["a pipe", "a device", "5,000 digits", "no text"])
def test_latest_file_without_a_name_is_repaired(tmp_path, kind):
    """The checkpoints are found without it."""
    file = latest(tmp_path)
    file.unlink()
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(b"9" * 5000 if kind == "5,000 digits" else b"\xff")
    with at_most(60):
        assert resolve_load(tmp_path) == tmp_path / "iter_0000004"
        (message,) = repair_save_folder(tmp_path)
        assert message.startswith(f"{file} now names iter_0000004: ")
    assert file.read_text() == "4"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["a pipe", "a device"])
def test_metrics_that_are_not_a_file_are_refused(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with at_most(60), pytest.raises(RunError, match=r"metrics\.jsonl: not a file; move it away"):
        draw_loss(Curves.read(tmp_path), tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_index_that_is_not_a_file_is_refused(tmp_path):
    """Even if the manifest, written by the same attacker, does not list it."""
    file = released("tensors.json")(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with at_most(60), pytest.raises(CheckpointError, match=r"tensors\.json"):
        same(DCPSource(file.parent))
    manifest = json.loads((file.parent / "complete.json").read_text())
    with at_most(60), pytest.raises(CheckpointError, match=r"tensors\.json: cannot be read: not a file"):
        read_file(file.parent, "tensors.json", manifest)


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**40, 2**40], [1] * 65, [0, True], [0, -1], [0, 1.0]])
def test_empty_tensor_of_an_impossible_shape_is_refused(tmp_path, shape):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"not a safetensors file: |which is not supported"):
        HFFolder(tmp_path)
    with pytest.raises(ValueError, match="a shape or an offset is not made of whole numbers"):
        _from_json(json.dumps({"a": {"dtype": "F32", "shape": shape, "chunks": []}}).encode())


def test_members_of_an_archive_are_never_inflated(tmp_path):
    """64 MB of deflated zeros in place of a tensor's description."""
    for name in ("archive/data.pkl", "archive/byteorder"):
        file = tmp_path / name.replace("/", "-")
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(name, "w") as one,
        ):
            for _ in range(64):
                one.write(bytes(1 << 20))
        tracemalloc.start()
        with file.open("rb") as opened, at_most(60), pytest.raises(pickle.UnpicklingError, match="not torch's"):
            find_tensor(opened, 0, file.stat().st_size, check=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20


def test_impossible_image_mean_or_deviation_is_refused(tmp_path):
    """With values outside of float32, all pixels would be infinite or zero."""
    file = small_file("preprocessor_config.json")(tmp_path)
    good = json.loads(file.read_text())
    for name, value in (("image_std", 1e308), ("image_mean", -1e308), ("image_std", 1e-50), ("rescale_factor", 0)):
        file.write_text(json.dumps(good | {name: value if name == "rescale_factor" else [value] * 3}))
        with pytest.raises(SettingError, match=name):
            ImageProcessor.from_folder(tmp_path, 1024, 65536)


if __name__ == "__main__":
    for one in KINDS:
        with tempfile.TemporaryDirectory() as root:
            print(f"{one}: {attack(one, Path(root), int(sys.argv[1]))} of {sys.argv[1]} refused", flush=True)
