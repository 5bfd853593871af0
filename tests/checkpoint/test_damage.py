"""Damaged and mixed-up checkpoints are refused in one line that names the file."""

import copy
import json
import math
import os
import pickle
import random
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import DATA, as_before, save_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp_metadata

from qwen35.checkpoint import tensor_file
from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.checkpoint.dcp_folder import keep_newest, manifest_content, newest_checkpoint
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.pickle_read import read_pickle
from qwen35.checkpoint.slices import TensorSlice, TensorSpec
from qwen35.checkpoint.tensor_file import ChecksumError, Entry, checksums, raw_bytes, read_slice
from qwen35.training.resume import repair_save_folder

BEFORE = DATA / "checkpoint_of_before"  # format 1, without tensors.json and checksums


def small(width: int = 400) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(3)
    model = torch.nn.Module()
    model.trained = torch.nn.Parameter(torch.randn(3, width))
    model.gate = torch.nn.Parameter(torch.tensor(2.0))
    model.frozen = torch.nn.Parameter(torch.arange(5.0).bfloat16(), requires_grad=False)
    return model, torch.optim.AdamW([model.trained, model.gate], lr=0.5)


def save(folder: Path, *steps: int) -> list[Path]:
    model, optimizer = small()
    paths = []
    for number in range(1, max(steps) + 1):
        ((model.trained**2).sum() * model.gate).backward()
        optimizer.step()
        if number in steps:
            extras = {"bins_a_step": 2, "data": "x"}, {"torch": torch.get_rng_state()[:8]}
            paths.append(save_checkpoint(folder, number, model, optimizer, *extras))
    return paths


def load(path: Path, width: int = 400) -> dict:
    """Everything that a resume reads from a checkpoint."""
    model, optimizer = small(width)
    loaded = load_checkpoint(path, model, optimizer)
    state = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        state |= {f"{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
    return {**state, "step": loaded.step, "extra": loaded.extra, **(loaded.rank_extra or {})}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def refusal(read) -> str:
    """The one-line error of a read that is refused; "" if it succeeds."""
    try:
        assert read()
    except CheckpointError as error:
        line = str(error)
    else:
        return ""
    assert line and "\n" not in line
    return line


# -- flipped bits, exchanged files, renamed folders ------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Steps 2 and 4 of a run."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    save(folder, 2, 4)
    return folder


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(run, tmp_path):
    """In every file. Only .metadata and the frames of archives, which are not read, may differ."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    checkpoint, wanted = folder / "iter_0000004", load(run / "iter_0000004")
    seed, refused = random.Random(1), dict.fromkeys((path.name for path in checkpoint.iterdir()), 0)
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for _ in range(30):
            data = bytearray(content)
            data[seed.randrange(len(data))] ^= 1 << seed.randrange(8)
            path.write_bytes(data)
            if words := refusal(lambda: same(load(checkpoint), wanted)):
                assert str(path) in words
                if path.name != "complete.json":  # if not JSON, it counts as interrupted
                    assert words.endswith("; move it away to use iter_0000002"), words
                refused[path.name] += 1
        path.write_bytes(content)
    assert refused.pop(".metadata") == 0
    assert 0 < refused.pop("__0_0.distcp") < 30
    assert set(refused.values()) == {30}


@pytest.mark.parametrize("name", ["model.trained", "optimizer.exp_avg.trained", "optimizer.step.gate", "model.frozen"])
def test_flipped_bits_of_a_tensor_are_refused(run, tmp_path, name):
    checkpoint = tmp_path / "iter_0000004"
    shutil.copytree(run / checkpoint.name, checkpoint)
    (chunk,) = json.loads((checkpoint / "tensors.json").read_text())[name]["chunks"]
    file = checkpoint / chunk["file"]
    content = file.read_bytes()
    prefix, _, rest = name.partition(".")
    whole = DCPSource(checkpoint, f"{prefix}.")
    nbytes = whole.specs[rest].nbytes
    value = content[chunk["begin"] : chunk["begin"] + nbytes]
    assert chunk["crc32"] == f"{zlib.crc32(value):08x}"
    for place in {0, nbytes // 2, nbytes - 1}:
        data = bytearray(content)
        data[chunk["begin"] + place] ^= 16
        file.write_bytes(data)
        with pytest.raises(
            CheckpointError, match=rf"__0_0\.distcp: is damaged at {name}: .* no older checkpoint is complete"
        ):
            load(checkpoint)


def test_every_flipped_bit_of_a_format_1_tensor_is_refused(tmp_path):
    checkpoint, found = tmp_path / "iter_0000007", load(BEFORE, 4)
    shutil.copytree(BEFORE / checkpoint.name, checkpoint)
    (file,) = checkpoint.glob("*.distcp")
    content = file.read_bytes()
    for name in ("trained", "frozen", "exp_avg.trained"):
        value = raw_bytes(found[name]).tobytes()
        assert content.count(value) == 1
        for place in range(len(value)):
            data = bytearray(content)
            data[content.index(value) + place] ^= 1
            file.write_bytes(data)
            assert "is damaged at " in refusal(lambda: load(checkpoint, 4)), (name, place)


@pytest.mark.parametrize("name", ["__0_0.distcp", "extra.json", "rank_00000.json", "tensors.json", "complete.json"])
def test_a_file_of_another_step_is_refused(run, tmp_path, name):
    """Of the same size, so that only its content tells."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    ours, other = folder / "iter_0000004" / name, folder / "iter_0000002" / name
    content = other.read_bytes()
    if content == ours.read_bytes():  # the extras of both steps are the same
        content = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    assert len(content) == ours.stat().st_size
    ours.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*; move it away to use iter_0000002"):
        load(folder)


def test_a_renamed_folder_is_refused(run, tmp_path):
    """A complete checkpoint under another step's name, in today's format and the one before."""
    for name in ("run", "before"):
        folder = tmp_path / name
        shutil.copytree(run, folder)
        if name == "before":
            as_before(folder / "iter_0000004")
        (folder / "iter_0000004").rename(folder / "iter_0000008")
        words = r"iter_0000008/complete\.json: it belongs to iter_0000004; move it away to use iter_0000002"
        for use in (newest_checkpoint, load, repair_save_folder):
            with pytest.raises(CheckpointError, match=words):
                use(folder)
        (folder / "iter_0000008").rename(folder / "the_best")
        assert same(load(folder / "the_best"), load(run / "iter_0000004"))  # a name that means no step


def test_newer_format_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run/iter_0000004/complete.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(CheckpointError, match=r"complete\.json: format 3 is newer"):
        load(tmp_path / "run")


def test_format_1_checkpoint_is_read():
    """A folder of format 1, of which only torch's archives have checksums."""
    found = load(BEFORE, 4)
    model, optimizer = small(4)
    with torch.no_grad():
        model.trained.data = torch.arange(12.0).view(3, 4)
        model.gate.fill_(2.0)
    ((model.trained**2).sum() * model.gate).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(found[name], p)
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(found[f"{key}.{name}"], value)
    assert (found["step"], found["extra"], found["torch"].tolist()) == (7, {"bins_a_step": 2, "data": "x"}, [1, 2, 3])


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_torch_reads_a_training_checkpoint(run):
    wanted = load(run / "iter_0000004")
    state = {f"model.{name}": torch.zeros_like(wanted[name]) for name in ("trained", "gate", "frozen")}
    state["optimizer.exp_avg.trained"] = torch.zeros(3, 400)
    dcp.load(state, checkpoint_id=run / "iter_0000004", no_dist=True)
    for name, value in state.items():
        assert torch.equal(value, wanted[name.removeprefix("model.").removeprefix("optimizer.")])


# -- blocks ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_region_is_read_and_checked_by_blocks(tmp_path, data):
    """Any region is read correctly, and damage is noticed exactly if it is in one of its blocks."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    start = [data.draw(st.integers(0, n - 1)) for n in shape]
    region = TensorSlice(
        tuple(start), tuple(data.draw(st.integers(1, n - a)) for n, a in zip(shape, start, strict=True))
    )
    block = data.draw(st.sampled_from([4, 8, 16, 64, 2**18]))
    values = torch.randn(shape)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tensor_file, "BLOCK", block)
        file, wanted, entry = (
            tmp_path / "file",
            checksums(raw_bytes(values)),
            Entry(TensorSpec(shape, torch.float32), 3),
        )
        content = b"abc" + raw_bytes(values).tobytes() + b"more"
        file.write_bytes(content)
        assert torch.equal(read_slice(file, entry, region, wanted), values[region.slices()])
        place = data.draw(st.integers(0, values.nbytes - 1))
        file.write_bytes(content[: 3 + place] + bytes([content[3 + place] ^ 1]) + content[4 + place :])
        blocks = {n * 4 // block for n in torch.arange(values.numel()).view(shape)[region.slices()].flatten().tolist()}
        if place // block in blocks:
            with pytest.raises(ChecksumError):
                read_slice(file, entry, region, wanted)
        else:
            assert torch.equal(read_slice(file, entry, region, wanted), values[region.slices()])


def test_a_part_costs_little_more_than_its_bytes(tmp_path, monkeypatch):
    values, preadv, counts = torch.randn(3000, 1000), os.preadv, []
    (tmp_path / "file").write_bytes(raw_bytes(values))
    wanted, entry = checksums(raw_bytes(values)), Entry(TensorSpec((3000, 1000), torch.float32), 0)

    def counting(fd, buffers, offset):
        counts.append(got := preadv(fd, buffers, offset))
        return got

    monkeypatch.setattr(os, "preadv", counting)
    for region in (
        TensorSlice((700, 0), (800, 1000)),
        TensorSlice((700, 0), (2, 1000)),
        TensorSlice((700, 10), (800, 3)),
    ):
        counts.clear()
        assert torch.equal(read_slice(tmp_path / "file", entry, region, wanted), values[region.slices()])
        assert sum(counts) <= region.lengths[0] * 4000 + 2 * tensor_file.BLOCK


# -- false descriptions ----------------------------------------------------------------------------

LIES = {
    "two chunks over each other": ([[0, 0], [1, 0]], [[2, 4], [2, 4]], "do not hold each element once"),
    "as many elements as there are, but not each": (
        [[0, 0], [0, 0]],
        [[1, 4], [2, 4]],
        "do not hold each element once",
    ),
    "a part is missing": ([[0, 0], [2, 0]], [[1, 4], [1, 4]], "do not hold each element once"),
    "no chunk": ([], [], "do not hold each element once"),
    "outside": ([[0, 0], [2, 0]], [[2, 4], [2, 4]], "lies outside of it"),
    "before the beginning": ([[-1, 0], [1, 0]], [[2, 4], [2, 4]], "not made of whole numbers"),
    "of other axes": ([[0], [2]], [[2], [1]], "has another number of axes"),
    "rows": ([[0, 0], [2, 0]], [[2, 4], [1, 4]], None),
    "columns": ([[0, 0], [0, 1]], [[3, 1], [3, 3]], None),
    "cut across and again": ([[0, 0], [0, 1], [2, 1]], [[3, 1], [2, 3], [1, 3]], None),
}


@pytest.mark.parametrize("form", ["json", "metadata"])
@pytest.mark.parametrize("lie", LIES)
def test_chunks_must_hold_each_element_once(tmp_path, lie, form):
    starts, sizes, words = LIES[lie]
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    values = torch.arange(12.0).view(3, 4)
    parts = (
        [values[a[0] : a[0] + n[0], a[1] : a[1] + n[1]] for a, n in zip(starts, sizes, strict=True)]
        if not words
        else []
    )
    content = b"".join(raw_bytes(part.contiguous()).tobytes() for part in parts)
    (checkpoint / "data").write_bytes(content.ljust(10_000, b"\0"))
    (checkpoint / ".metadata").touch()
    if form == "json":
        rows, begin = [], 0
        for a, n in zip(starts, sizes, strict=True):
            value = content[begin : begin + 4 * math.prod(n)].ljust(4 * math.prod(n), b"\0")
            rows.append({"start": a, "size": n, "file": "data", "begin": begin, "crc32": checksums(memoryview(value))})
            begin += len(value)
        (checkpoint / "tensors.json").write_text(
            json.dumps({"model.x": {"dtype": "F32", "shape": [3, 4], "chunks": rows}})
        )
        write_marker(checkpoint)
    else:
        write_metadata(checkpoint, starts, sizes)
    if words is None:
        source = DCPSource(checkpoint)
        if form == "json":
            assert torch.equal(source.read("x", TensorSlice((0, 0), (3, 4))), values)
        return
    with pytest.raises(CheckpointError, match=rf"is broken or not DCP's: .*{words}") as caught:
        DCPSource(checkpoint)
    assert "\n" not in str(caught.value)


def write_marker(checkpoint: Path, step: int = 1) -> None:
    (checkpoint / "complete.json").write_text(json.dumps(manifest_content(checkpoint, step)))


def write_metadata(checkpoint: Path, starts, sizes, **info) -> None:
    place = {"relative_path": "data", "offset": 0, "length": 1000} | info
    chunks = [dcp_metadata.ChunkStorageMetadata(torch.Size(n), torch.Size(n)) for n in sizes]
    for chunk, a in zip(chunks, starts, strict=True):
        chunk.offsets = Pickles(torch.Size, a) if min(a) < 0 else torch.Size(a)
    properties = dcp_metadata.TensorProperties(dtype=torch.float32)
    content = dcp_metadata.Metadata(
        {"model.x": dcp_metadata.TensorStorageMetadata(properties, torch.Size([3, 4]), chunks)},
        storage_data={
            dcp_metadata.MetadataIndex("model.x", torch.Size(a)): dcp.filesystem._StorageInfo(**place) for a in starts
        },
    )
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))


class Pickles:
    """Pickled as a call with these arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"relative_path": "../data"}, "its file is not one of this checkpoint"),
        ({"relative_path": "/etc/passwd"}, "its file is not one of this checkpoint"),
        ({"relative_path": "gone"}, "its file is not one of this checkpoint"),
        ({"relative_path": 7}, "its file is not one of this checkpoint"),
        ({"offset": -8}, "does not have the size of its bytes"),
        ({"offset": 9_500}, "lies beyond the end of data"),
        ({"length": 47}, "does not have the size of its bytes"),
        ({"length": 2**64}, "does not have the size of its bytes"),
        ({"length": True}, "does not have the size of its bytes"),
        ({"transform_descriptors": ["zstd"]}, "in a form that is not supported"),
    ],
)
def test_chunks_outside_of_files_are_refused(tmp_path, info, words):
    (tmp_path / "data").write_bytes(bytes(10_000))
    write_metadata(tmp_path, [[0, 0]], [[3, 4]], **info)
    with pytest.raises(CheckpointError, match=rf"\.metadata is broken or not DCP's: .*{words}"):
        DCPSource(tmp_path)


ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2**63,
        2**70,
        1e308,
        "",
        "x",
        "../x",
        "/etc/passwd",
        "\u202e\x1b[31m",
        "9" * 5000,
        [],
        [[]],
        {},
    ]
)


def changed(data, value):
    """JSON with one value replaced, removed, added or doubled."""
    way = data.draw(st.sampled_from(["deeper", "deeper", "deeper", "odd", "remove", "add"]))
    if way == "odd" or not isinstance(value, dict | list) or not value:
        return data.draw(ODD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, value = data.draw(st.sampled_from(keys)), copy.copy(value)
    if way == "remove":
        del value[key]
    elif way == "add" and isinstance(value, dict):
        value[data.draw(st.text(max_size=9))] = data.draw(ODD)
    elif way == "add":
        value.append(value[key])
    else:
        value[key] = changed(data, value[key])
    return value


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_json_is_read_or_refused(run, tmp_path, data):
    """Even with forged checksums; the message is short and printable."""
    checkpoint = tmp_path / "iter_0000004"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(run / checkpoint.name, checkpoint)
    file = checkpoint / data.draw(st.sampled_from(["tensors.json", "extra.json", "rank_00000.json", "complete.json"]))
    file.write_text(json.dumps(changed(data, json.loads(file.read_text()))))
    if file.name != "complete.json":
        (checkpoint / "complete.json").unlink()
        write_marker(checkpoint, 4)
    words = refusal(lambda: load(checkpoint))
    assert len(words) < 1000 and words.isprintable()


# -- pickles ---------------------------------------------------------------------------------------

GOOD = (BEFORE / "iter_0000007/.metadata").read_bytes()
CLASSES = (Path, type(Path("/")), torch.Size, *vars(dcp_metadata).values())


@dataclass
class World:
    """The attributes of classes that a pickle must not change."""

    attributes: dict

    @staticmethod
    def now() -> "World":
        return World({id(c): dict(vars(c)) for c in CLASSES if isinstance(c, type)})


def deep(count: int) -> bytes:
    """Nested tuples as the key of a dict: hashing it would overflow the stack."""
    return b"\x80\x04}" + b")" + b"\x85" * count + b"Ns."


HOSTILE = {
    "an attribute of a class": GOOD[:-1] + b"cpathlib\nPosixPath\nN}(X\x04\0\0\0nameX\5\0\0\0/evilu\x86b0.",
    "an attribute of a class, and the rest": GOOD[:2]
    + b"cpathlib\nPosixPath\n}X\x04\0\0\0nameX\5\0\0\0/evilsb"
    + GOOD[2:],
    "an attribute of a dtype": b"\x80\x04ctorch\nfloat32\n}X\x01\0\0\0aK\x01sb.",
    "nested keys": deep(300_000),
    "nested lists": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a large memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a larger memo": b"\x80\x04Np4611686018427387904\n.",
    "a long text": b"\x80\x04X\xff\xff\xff\x7fabc.",
    "a long array": b"\x80\x05\x96\xff\xff\xff\xff\x00\x00\x00\x00abc.",
    "a long number": b"\x80\x04\x8b\xff\xff\xff\x7f1.",
    "many digits": b"\x80\x04I" + b"9" * 100_000 + b"\n.",
    "a code of the registry": b"\x80\x04\x82\x01.",
    "a call": b"cposix\nsystem\n(X\x04\0\0\0true\x85R.",
    "an instance": b"(cos\nsystem\nX\x04\0\0\0trueo.",
    "a mark that is not there": b"\x80\x04u.",
    "too much": bytes(2**26 + 1),
    "itself": b"\x80\x04]\x94h\x00ah\x00a.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_changes_nothing(tmp_path, kind):
    (tmp_path / "__0_0.distcp").write_bytes((BEFORE / "iter_0000007/__0_0.distcp").read_bytes())
    (tmp_path / ".metadata").write_bytes(HOSTILE[kind])
    before = World.now()
    with pytest.raises(CheckpointError, match=r"\.metadata is broken or not DCP's: ") as caught:
        DCPSource(tmp_path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert World.now() == before
    assert Path("/a/b").name == "b"


CODES = st.sampled_from([bytes([n]) for n in range(256)])
PIECES = st.sampled_from(
    [
        b"cpathlib\nPosixPath\n",
        b"ctorch\nSize\n",
        b"K\x01",
        b"X\x01\0\0\0a",
        b"}",
        b"]",
        b")",
        b"(",
        b"u",
        b"b",
        b"R",
        b"\x81",
    ]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_pickles_are_data_or_refused(tmp_path, data):
    """A changed pickle, or random opcodes, are read as data or refused in one line."""
    content = bytearray(GOOD if data.draw(st.booleans()) else b"\x80\x04")
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(content)))
        what = data.draw(st.sampled_from(["put", "change", "drop", "double"]))
        piece = data.draw(st.one_of(CODES, PIECES, st.binary(max_size=6)))
        end = place + data.draw(st.integers(0, 20))
        content[place : {"put": place, "change": place + len(piece)}.get(what, end)] = {
            "drop": b"", "double": content[place:end] * 2
        }.get(what, piece)  # fmt: skip
    (tmp_path / "__0_0.distcp").write_bytes((BEFORE / "iter_0000007/__0_0.distcp").read_bytes())
    (tmp_path / ".metadata").write_bytes(content)
    before = World.now()

    def read() -> bool:
        source = DCPSource(tmp_path)
        return all(
            source.read(name, TensorSlice.full(spec.shape)).shape == spec.shape for name, spec in source.specs.items()
        )

    refusal(read)
    assert World.now() == before


def test_pickles_are_read_as_data():
    class Thing:
        def __init__(self):
            self.a = {"k": (1, [2**40, -1, None, True])}

    Thing.__qualname__, Thing.__module__ = "World", __name__
    globals()["World"], kept = Thing, globals()["World"]
    try:
        texts = [pickle.dumps(Thing(), protocol) for protocol in (2, 3, 4, 5)]
    finally:
        globals()["World"] = kept
    for text in texts:
        found = read_pickle(text)
        assert found.args in ((), (found.args[0] if found.args else None,))
        ((key, value),) = found.state
        assert (key, value) == ("a", [("k", (1, [2**40, -1, None, True]))])


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(2000), b"PK\x05\x06" + bytes(18)])
def test_damaged_format_1_archive_is_refused(tmp_path, content):
    shutil.copytree(BEFORE / "iter_0000007", tmp_path / "iter_0000007")
    file = tmp_path / "iter_0000007/__0_0.distcp"
    file.write_bytes(content.ljust(file.stat().st_size, b"\0"))
    with pytest.raises(
        CheckpointError, match=r"__0_0\.distcp: is damaged at .*: it is not an archive written by torch; move"
    ):
        load(tmp_path, 4)


# -- after an interruption -------------------------------------------------------------------------


def test_incomplete_checkpoint_is_renamed_and_reported(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    broken = folder / "iter_0000004"
    for number in ("", "1"):
        os.truncate(broken / "__0_0.distcp", 100)
        (line, named) = repair_save_folder(folder)
        assert line.startswith(f"{broken} is incomplete ({broken}/__0_0.distcp: 100 bytes, complete.json says ")
        assert f"): renamed to iter_0000004.damaged{number}, and the run goes on from {folder}/iter_0000002" in line
        assert named == f"{folder}/latest_checkpointed_iteration.txt now names iter_0000002"
        assert (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
        assert repair_save_folder(folder) == []
        shutil.copytree(run / "iter_0000004", broken)
        (folder / "latest_checkpointed_iteration.txt").write_text("4")
    (broken / ".metadata").unlink()
    assert f"({broken}/.metadata: no such file)" in repair_save_folder(folder)[0]
    assert sorted(path.name for path in folder.glob("*.damaged*")) == [f"iter_0000004.damaged{n}" for n in ("", 1, 2)]
    keep_newest(folder, 1)
    assert len(list(folder.glob("*.damaged*"))) == 3


def test_run_without_a_complete_checkpoint_does_not_start_anew(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for path in folder.glob("iter_*"):
        (path / "complete.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no complete checkpoint in it; .*iter_0000004/complete\.json: no such file\. Move"
    ):
        repair_save_folder(folder)


def test_latest_file_is_repaired_after_a_kill(run, tmp_path):
    """Between the last rename and the update of the file, which may hold anything."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    latest = folder / "latest_checkpointed_iteration.txt"
    for text in ("2", "", "9" * 5000, "²", "release"):
        latest.write_text(text)
        assert same(load(folder), load(run / "iter_0000004"))
        assert "now names iter_0000004: a job was stopped before" in repair_save_folder(folder)[0]
        assert latest.read_text() == "4"
