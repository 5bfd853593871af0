"""`make data` on many records: any number of processes, all images checked, all skips counted."""

import json
import os
import re
import signal
import stat

import numpy as np
import pytest
from PIL import Image
from tokenizer_fixture import make_model_folder

from bench.data import write
from qwen35.config.load import from_flat
from qwen35.data import MicroBatches, RecordError
from qwen35.data import llava as module
from qwen35.data.files import replacing
from qwen35.data.histogram import histogram, quantiles
from qwen35.data.llava import Options
from qwen35.data.llava import convert as run
from qwen35.errors import SettingError, UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "RECORDS_PER_JOB", 7)


@pytest.fixture
def home(tmp_path):
    """60 records in llava.json, of 20 images."""
    write(tmp_path, 60, 20)
    return tmp_path


def options(home, **more):
    given = {"llava": home / "llava.json", "images": home / "train2017", "out": home / "out" / "a.json"}
    return Options(**(given | more))


def damage(home) -> None:
    """One image is missing, one is not an image, one has a cut header; two bad records."""
    pictures, records = home / "train2017", json.loads((home / "llava.json").read_text())
    (pictures / f"{3:012}.jpg").unlink()
    (pictures / f"{5:012}.jpg").write_bytes(b"no image")
    whole = (pictures / f"{8:012}.jpg").read_bytes()
    (pictures / f"{8:012}.jpg").write_bytes(whole[:100])
    records[11]["conversations"] = []
    records[42] = 7
    (home / "llava.json").write_text(json.dumps(records))


def test_several_processes_write_the_same_as_one(home):
    damage(home)
    reports, files = [], []
    for workers in (1, 2, 5):
        report = run(options(home, workers=workers, on_bad_record="skip"))
        reports.append(report)
        files.append([path.read_bytes() for path in sorted((home / "out").iterdir())])
    assert reports[0] == reports[1] == reports[2] and files[0] == files[1] == files[2]
    records = json.loads((home / "llava.json").read_text())
    bad = {i for i in range(60) if i % 20 in (3, 5, 8)} | {11, 42}
    written = json.loads((home / "out/a.json").read_text())
    assert [record["messages"][-1]["content"] for record in written] == [
        record["conversations"][-1]["value"] for i, record in enumerate(records) if i not in bad
    ]
    assert f"a.json: 49 records, {sum(len(r['messages']) for r in written):,} turns, 49 images\n" in reports[0]
    assert f"left out: 3 records whose image is not in {home}/train2017: {3:012}.jpg\n" in reports[0]
    kinds = r"left out: 11 records in all: 6 image broken, 3 image missing, 2 malformed; first: .*record 4 \(id 0+3\)"
    assert re.search(kinds, reports[0])
    report = (home / "out/a.report.txt").read_text()
    named = {int(number) - 1 for number in re.findall(r"^\S*llava\.json, record (\d+)", report, re.MULTILINE)}
    assert named == bad and reports[0].startswith(report[:300])
    with Image.open(home / "out/a.lengths.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 2


def test_an_error_leaves_nothing_written(home):
    damage(home)
    with pytest.raises(RecordError, match=r"record 6 \(id 0+5\): image 1 of 1, .*5\.jpg: is not an image"):
        run(options(home, workers=2))
    with pytest.raises(RecordError, match=r"record 6 "):
        run(options(home, workers=2, on_missing="skip"))
    assert not (home / "out").exists()


def test_check_none_accepts_any_image(home):
    damage(home)
    with pytest.raises(RecordError, match=r"record 12 .*conversations"):
        run(options(home, check="none"))
    report = run(options(home, check="none", on_bad_record="skip"))
    assert ": 58 records, " in report and "the images were not checked (--check none)" in report
    with pytest.raises(SettingError, match="leave out --check none"):
        run(options(home, check="none", tokenizer=home))


def test_lengths_in_tokens_equal_those_of_training(home):
    model = make_model_folder(home / "hf")
    report = run(options(home, tokenizer=model, workers=2))
    flat = {
        "model.model_name_or_path": str(model),
        "data.dataset_param.basic_parameters.dataset": str(home / "out/a.json"),
        "data.dataset_param.basic_parameters.dataset_dir": str(home),
        "data.dataset_param.basic_parameters.cutoff_len": 100_000,
        "training.train_iters": 1,
        "training.save": "unused",
    }
    lengths = MicroBatches(from_flat(flat), 0, 1).dataset.lengths
    assert f"longest {lengths.max():,}; {lengths.sum():,} in all" in report and "tokens per sample: p50 " in report
    assert f" cutoff_len 2,048: {(lengths > 2048).sum():,} (" in report
    for low, high, count in re.findall(r"^ +([\d,]+) to +([\d,]+) #* +([\d,]+)$", report, re.MULTILINE):
        first, last, number = (int(text.replace(",", "")) for text in (low, high, count))
        assert ((first <= lengths) & (lengths <= last)).sum() == number
    characters = run(options(home, workers=2))
    total = sum(len(m["content"]) for r in json.loads((home / "out/a.json").read_text()) for m in r["messages"])
    assert f"{total:,} in all" in characters and "make data HF=" in characters and "cutoff_len" not in characters
    (home / "hf/tokenizer.json").unlink()
    for workers in (1, 2):
        with pytest.raises(SettingError, match=r"tokenizer\.json: no such file"):
            run(options(home, tokenizer=model, workers=workers))


@pytest.mark.parametrize("lengths", [[1], [0, 0], [5, 5, 5], [12], [11], [1, 10**6], [999, 1000, 1001]])
def test_histograms_of_unusual_lengths(lengths):
    rows = re.findall(r"^ +([\d,]+) to +([\d,]+) #* +([\d,]+)$", histogram(np.array(lengths), "tokens"), re.MULTILINE)
    bounds = [tuple(int(text.replace(",", "")) for text in row) for row in rows]
    assert sum(count for *_, count in bounds) == len(lengths) and len(bounds) <= 14
    assert all(((low <= np.array(lengths)) & (np.array(lengths) <= high)).sum() == n for low, high, n in bounds)
    assert bounds[0][2] and bounds[-1][2]  # no rows of nothing before the shortest, or after the longest


@pytest.mark.parametrize("cutoff", [1, 5, 9, 10, 11, 30, 10**6])
def test_the_line_for_cutoff_len_stands_among_the_buckets(cutoff):
    lengths = np.array([2, 5, 9, 10, 25])
    lines = histogram(lengths, "tokens", cutoff).splitlines()
    [at] = [number for number, line in enumerate(lines) if "cutoff_len" in line]
    longer = int((lengths > cutoff).sum())
    assert lines[at].endswith(f" cutoff_len {cutoff:,}: {longer} ({longer / 5:.1%}) are longer")
    rows = [re.fullmatch(r" +([\d,]+) to +([\d,]+) #* +([\d,]+)", line) for line in lines]
    assert all(int(row[1].replace(",", "")) <= cutoff for row in rows[1:at])
    assert all(int(row[1].replace(",", "")) > cutoff for row in rows[at + 1 :])


def test_quantiles_are_lengths_that_occur():
    lengths = np.random.default_rng(0).integers(1, 5000, 1000)
    for name, length in quantiles(lengths).items():
        share = int(name[1:]) / 100
        assert length in lengths and (lengths <= length).mean() >= share > (lengths < length).mean() - 0.002


def test_a_process_that_dies_ends_the_conversion(home, monkeypatch):
    """As if memory had run out: one line, and nothing is written."""
    check = module.upright_size

    def dying(path, odd):
        if path.name == f"{13:012}.jpg":
            os.kill(os.getpid(), signal.SIGKILL)
        return check(path, odd)

    monkeypatch.setattr(module, "upright_size", dying)
    with pytest.raises(
        UserError, match=r"^a worker process died before its work was done; .*--workers 1 needs the least$"
    ):
        run(options(home, workers=2))
    assert not (home / "out").exists()


def test_an_error_of_a_whole_job_is_one_line(home, monkeypatch):
    def full(path, odd):
        raise SettingError("cache_dir: cannot be written")

    monkeypatch.setattr(module, "upright_size", full)
    for workers in (1, 2):
        with pytest.raises(SettingError, match=r"^cache_dir: cannot be written$"):
            run(options(home, workers=workers, on_bad_record="skip"))


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~mask
