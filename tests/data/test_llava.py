"""`make data` on many records: any number of processes, all images checked, all skips counted."""

import json
import os
import re
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
from qwen35.data.in_order import in_order
from qwen35.data.llava import Options
from qwen35.data.llava import convert as run
from qwen35.data.tally import Tally
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
    assert f"the longest {lengths.max():,}; {lengths.sum():,} in all" in report and "tokens per record: half" in report
    for low, high, count in re.findall(r"^ +([\d,]+) to +([\d,]+) #* +([\d,]+)$", report, re.MULTILINE):
        first, last, number = (int(text.replace(",", "")) for text in (low, high, count))
        assert ((first <= lengths) & (lengths <= last)).sum() == number
    characters = run(options(home, workers=2))
    total = sum(len(m["content"]) for r in json.loads((home / "out/a.json").read_text()) for m in r["messages"])
    assert f"{total:,} in all" in characters and "make data HF=" in characters
    (home / "hf/tokenizer.json").unlink()
    for workers in (1, 2):
        with pytest.raises(SettingError, match=r"tokenizer\.json: no such file"):
            run(options(home, tokenizer=model, workers=workers))


@pytest.mark.parametrize("lengths", [[1], [0, 0], [5, 5, 5], [12], [11], [1, 10**6], [999, 1000, 1001]])
def test_histograms_of_unusual_lengths(lengths):
    tally = Tally("tokens")
    for length in lengths:
        tally.add(1, 0, length)
    rows = re.findall(r"^ +([\d,]+) to +([\d,]+) #* +([\d,]+)$", tally.histogram(), re.MULTILINE)
    bounds = [tuple(int(text.replace(",", "")) for text in row) for row in rows]
    assert sum(count for *_, count in bounds) == len(lengths) and len(bounds) <= 14
    assert all(((low <= np.array(lengths)) & (np.array(lengths) <= high)).sum() == n for low, high, n in bounds)


# -- jobs in order ---------------------------------------------------------------------------------


def square():
    return lambda job: (job * job, os.getpid())


@pytest.mark.parametrize("count", [0, 1, 3, 4, 20])
def test_results_come_in_the_order_of_the_jobs(count):
    done = list(in_order(square, range(count), 3))
    assert [result for result, _ in done] == [i * i for i in range(count)]
    assert len({process for _, process in done}) == (1 if 0 < count < 2 else min(count, 3))


def test_jobs_are_taken_one_at_a_time():
    taken = []
    results = in_order(square, (taken.append(i) or i for i in range(50)), 3)
    for seen in range(10):
        next(results)
        assert len(taken) <= seen + 1 + 3
    results.close()


def failing():
    def work(job):
        if job == 5:
            raise RecordError("record 5 is bad", "malformed")
        return job

    return work


def dying():
    return lambda job: os._exit(9) if job == 5 else job


@pytest.mark.parametrize(("make", "message"), [(failing, "record 5 is bad"), (dying, "died before its work was done")])
def test_errors_and_deaths_of_workers_are_reported(make, message):
    seen = []
    with pytest.raises(UserError, match=message):
        seen.extend(in_order(make, range(20), 2))
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~mask
