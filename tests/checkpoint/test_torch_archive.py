"""DCP's files read by byte ranges, compared with torch's own reader and writer."""

import io
import os
import pickle
import re
import zipfile
import zlib

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import MemorySource

from qwen35.checkpoint import dcp_write, torch_archive
from qwen35.checkpoint.dcp_folder import resolve_load
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.checkpoint.dcp_write import append_tensor, write_release
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.slices import THREADS, TensorSlice, TensorSpec, ahead, pieces
from qwen35.checkpoint.tensor_file import Entry, checksums, raw_bytes, read_slice
from qwen35.checkpoint.torch_archive import BROKEN_ARCHIVE, STORAGES, find_tensor

TENSORS = {
    "wide": torch.arange(7 * 6 * 5, dtype=torch.float32).view(7, 6, 5),
    "brain": torch.arange(60).view(12, 5).to(torch.bfloat16),
    "turned": torch.arange(60.0).view(12, 5).T,
    "slanted": torch.arange(60.0).as_strided((4, 3), (7, 2), 5),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}
REGIONS = {
    "wide": [((0, 0, 0), (7, 6, 5)), ((2, 0, 0), (3, 6, 5)), ((1, 2, 3), (5, 3, 1))],
    "brain": [((3, 0), (2, 5)), ((0, 1), (12, 2))],
    "turned": [((0, 0), (5, 12)), ((1, 2), (3, 4))],
    "slanted": [((0, 0), (4, 3)), ((1, 1), (2, 2))],
    "count": [((), ())],
    "empty": [((0, 0), (0, 4))],
}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_files_of_torch_are_read_in_any_region(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in TENSORS.items()}
    dcp.save({**state, "model.notes": {"no": "tensor"}}, checkpoint_id=tmp_path, no_dist=True)
    source = DCPSource(tmp_path)
    assert set(source.specs) == set(TENSORS)
    for name, tensor in TENSORS.items():
        for region in (TensorSlice(*b) for b in REGIONS[name]):
            values = source.read(name, region)
            assert values.dtype == tensor.dtype
            assert torch.equal(values, tensor[region.slices()]), (name, region)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_torch_reads_a_release(tmp_path, monkeypatch):
    """Written in many pieces, each tensor is complete for torch's own reader."""
    monkeypatch.setattr(dcp_write, "pieces", lambda region, size: pieces(region, size, 64))
    progress = []
    write_release(MemorySource(TENSORS), tmp_path, progress.append)
    assert sum(progress) == sum(t.nbytes for t in TENSORS.values())
    state = {f"model.{name}": torch.full_like(tensor, 99) for name, tensor in TENSORS.items()}
    dcp.load(state, checkpoint_id=tmp_path / "release", no_dist=True)
    for name, tensor in TENSORS.items():
        assert torch.equal(state[f"model.{name}"], tensor), name


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_part_costs_its_own_bytes(tmp_path, monkeypatch):
    """Whatever the size of the chunk, which is read once as a whole to compare its checksum."""
    tensor = torch.arange(3_000_000, dtype=torch.float32).view(3000, 1000)
    state = {"model.x": tensor}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    source, preadv, counts = DCPSource(tmp_path), os.preadv, []

    def counting(fd, buffers, offset):
        counts.append(got := preadv(fd, buffers, offset))
        return got

    monkeypatch.setattr(os, "preadv", counting)
    assert torch.equal(source.read("x", TensorSlice((7, 0), (2, 1000))), tensor[7:9])
    assert 12_000_000 + 8000 < sum(counts) < 12_000_000 + 8000 + 8192
    counts.clear()
    assert torch.equal(source.read("x", TensorSlice((7, 10), (2, 5))), tensor[7:9, 10:15])
    assert counts == [20, 20]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("has_checksums", [True, False])
def test_archive_checksums_are_verified(tmp_path, monkeypatch, has_checksums):
    """Those of torch.save, wherever the damage is; without them it goes unnoticed."""
    monkeypatch.setattr(torch_archive, "PIECE_BYTES", 1000)
    values = {"model.x": torch.randn(30, 20), "model.empty": torch.zeros(0, 3), "model.y": torch.ones(2)}
    torch.serialization.set_crc32_options(has_checksums)
    try:
        dcp.save(values, checkpoint_id=tmp_path, no_dist=True)
    finally:
        torch.serialization.set_crc32_options(True)
    source = DCPSource(tmp_path)
    for name, value in values.items():
        assert torch.equal(source.read(name[6:], TensorSlice.full(value.shape)), value)
    (file,) = (path for path in tmp_path.glob("*.distcp") if path.stat().st_size)
    content, of_x = file.read_bytes(), raw_bytes(values["model.x"]).tobytes()
    for place in (0, 1500, 2399):
        damaged = bytearray(content)
        damaged[content.index(of_x) + place] ^= 16
        file.write_bytes(damaged)
        source = DCPSource(tmp_path)
        assert torch.equal(source.read("y", TensorSlice((0,), (2,))), values["model.y"])
        if has_checksums:
            with pytest.raises(CheckpointError, match=r"is damaged at model\.x: a checksum does not match"):
                source.read("x", TensorSlice((7, 3), (1, 2)))
        else:
            assert not torch.equal(source.read("x", TensorSlice((0, 0), (30, 20))), values["model.x"])


@pytest.mark.parametrize("dtype", STORAGES.values(), ids=str)
def test_every_dtype_round_trips_at_any_offset(tmp_path, dtype):
    tensor = torch.tensor([[1, 0, 3], [4, 5, 6]]).to(dtype)
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"something else")
        offset, length, begin = append_tensor(tensor, file)
        file.write(b"and more")
    path, region, entry = (
        tmp_path / "file",
        TensorSlice((0, 1), (2, 2)),
        Entry(TensorSpec((2, 3), dtype), begin),
    )
    assert torch.equal(found(path, offset, length).read(path, region), tensor[:, 1:])
    assert torch.equal(read_slice(path, entry, region, checksums(raw_bytes(tensor))), tensor[:, 1:])
    assert checksums(raw_bytes(tensor)) == f"{zlib.crc32(tensor.view(torch.uint8).numpy().tobytes()):08x}"


def found(path, offset, length):
    with path.open("rb") as file:
        return find_tensor(file, offset, length, check=True)


def archive(description: bytes, data: bytes = b"\0" * 8, order: bytes = b"little") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", description)
        file.writestr("archive/byteorder", order)
        file.writestr("archive/data/0", data)
    return buffer.getvalue()


def described(tensor: torch.Tensor, numel: int) -> bytes:
    """torch.save's description of a tensor, with another number of elements."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    text = zipfile.ZipFile(buffer).read("archive/data.pkl")
    whole = b"K" + bytes([tensor.numel()])
    assert text.count(b"cpu") == 1
    head, tail = text.split(b"cpu")
    return head + b"cpu" + tail.replace(whole, b"K" + bytes([numel]), 1)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda path: archive(pickle.dumps(Evil(os.mkdir, str(path)))), "mkdir has no place in it"),
        (lambda path: archive(pickle.dumps(Evil(getattr, "text", "upper"))), "getattr has no place in it"),
        (lambda path: archive(pickle.dumps([1])), "list has no place in it"),
        (lambda path: archive(described(torch.zeros(2), 2)), None),
        (lambda path: archive(described(torch.zeros(2), 9)), "some of its bytes are missing"),
        (lambda path: archive(described(torch.zeros(2), 1), b"\0" * 4), "beyond its storage"),
        (lambda path: archive(described(torch.zeros(2), 2), order=b"big"), "not little-endian"),
        (lambda path: archive(described(torch.zeros(2), 2))[:-5], "not a zip file"),
        (lambda path: b"", "not a zip file"),
    ],
)
def test_anything_but_a_plain_tensor_is_refused(tmp_path, content, words):
    made = tmp_path / "made"
    (tmp_path / "file").write_bytes(content(made))
    size = (tmp_path / "file").stat().st_size
    if words is None:
        whole = found(tmp_path / "file", 0, size).read(tmp_path / "file", TensorSlice((0,), (2,)))
        assert torch.equal(whole, torch.zeros(2))
        return
    with pytest.raises(BROKEN_ARCHIVE, match=words):
        found(tmp_path / "file", 0, size)
    assert not made.exists()


def test_damage_is_one_line(tmp_path):
    write_release(MemorySource({"x": torch.randn(30, 10)}), tmp_path)
    checkpoint = resolve_load(tmp_path)
    (data,) = (p for p in checkpoint.glob("*.distcp") if p.stat().st_size)
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(data))}: is damaged at model\.x: .*; convert the weights again"
    ):
        DCPSource(checkpoint).read("x", TensorSlice((0, 0), (1, 1)))
    source = DCPSource(checkpoint)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"model\.x cannot be read: .*No such file"):
        source.read("x", TensorSlice((0, 0), (1, 1)))


# -- threads ---------------------------------------------------------------------------------------


def test_every_item_is_worked_on_once_and_in_order():
    assert list(ahead(lambda n: n * 2, range(1000))) == list(range(0, 2000, 2))
    assert list(ahead(str, [])) == []


def test_threads_are_only_a_little_ahead():
    """Or all of a model would be held in memory."""
    begun = []
    for done in ahead(lambda n: begun.append(n) or n, range(100)):
        assert len(begun) <= done + 1 + THREADS


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_error_stops_all(error):
    worked = []

    def work(item):
        worked.append(item)
        if item == 20:
            raise error

    with pytest.raises(type(error)):
        list(ahead(work, range(10**6)))
    assert 20 in worked
    assert len(worked) < 100


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"dcp/release cannot be written: No space left on device"):
        write_release(MemorySource(TENSORS), tmp_path / "dcp")
    assert not list(tmp_path.iterdir())
