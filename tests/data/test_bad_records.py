"""on_bad_record: unusable records are left out, counted and named, the same on every rank."""

import json
import re
from itertools import pairwise

import pytest
import torch
from mistakes import (
    BASIC,
    SHOW,
    TRAIN,
    begin,
    change,
    cut,
    finish,
    in_half,
    launch,
    place,
    remove,
    run,
    turns,
    whole,
)
from PIL import Image
from ports import free_port

from qwen35.batch import IGNORE
from qwen35.config.load import load_settings
from qwen35.data import MicroBatches, RecordError
from qwen35.data.preparation import Preparation
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.errors import SettingError
from qwen35.tools.doctor.host import Machine
from qwen35.tools.doctor.recipe import look
from qwen35.training.metrics import read_metrics

__all__ = ["place", "whole"]  # fixtures

FILE, SKIP = "data/a.json", f"{BASIC}.on_bad_record=skip"


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def loader(*overrides: str) -> MicroBatches:
    return MicroBatches(load_settings("r.yaml", overrides), 0, 1)


def batches(count: int, *overrides: str) -> list:
    stream = iter(loader(*overrides))
    return [next(stream) for _ in range(count)]


def three_bad(place) -> None:
    """Record 2 is too long, record 3 has lost its image, record 6's conversation is empty."""
    turns(("human", "<image>"), ("gpt", "word " * 200))(place)
    remove("data/2.png")(place)
    change(FILE, "5.conversations", [])(place)


SKIPPED = (
    "data: skipped 3 of 12 records: 1 image missing, 1 malformed, 1 longer than cutoff_len; "
    "first: data/a.json, record 3 (id r2): image 1 of 1, {place}/data/2.png: no such file"
)


def test_the_remaining_samples_equal_those_of_a_clean_file(place):
    three_bad(place)
    given, clean = batches(6, SKIP), json.loads((place / FILE).read_text())
    (place / "data/clean.json").write_text(json.dumps([clean[i] for i in range(12) if i not in (1, 2, 5)]))
    for ours, theirs in zip(given, batches(6, f"{BASIC}.dataset=data/clean.json"), strict=True):
        for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "pixel_values", "grid_thw", "is_pad"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert ours.bad_records == ()
    ours, theirs = loader(SKIP), loader(f"{BASIC}.dataset=data/clean.json")
    assert ours.report() == theirs.report() + "\n" + SKIPPED.format(place=place)
    assert [ours.dataset.source(i)[-4:] for i in range(9)] == [f"(id r{i})"[-4:] for i in (0, 3, 4, 6, 7, 8, 9, 10, 11)]


def test_a_run_reports_bad_records_once(place):
    three_bad(place)
    done = run(place, *TRAIN, SKIP)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("skipped") == 1 and SKIPPED.format(place=place) + "\n" in done.out
    assert read_metrics(place / "run/metrics.jsonl")[0]["bad_records"] == 0
    assert run(place, *TRAIN, "training.save=other").code == 1


def test_show_reports_skipped_records(place):
    three_bad(place)
    out = run(place, *SHOW, SKIP, "--samples", "12").out
    left_out = re.findall(r"--- left out: data/a\.json, record (\d+)", out)
    assert left_out == ["3", "6"] and re.search(
        r"record 2 \(id r1\): \d+ tokens, MORE THAN cutoff_len 160, left out", out
    )
    assert len(re.findall(r"^--- data", out, re.MULTILINE)) == 10


def test_doctor_reports_skipped_records(place):
    three_bad(place)
    skipping, settings = load_settings("r.yaml", [SKIP]), load_settings("r.yaml")
    found: list = []
    look(Machine(), skipping, found, 1)
    fine, finding, *_ = [f for f in found if f.subject == "data"]
    assert fine.fact.startswith("9 samples of 1 file, ")  # one is longer than cutoff_len
    assert finding.status == "note"
    words = (
        "skipped 3 of 12 records: 1 image missing, 1 malformed, 1 longer than cutoff_len; first: data/a.json, record 3"
    )
    assert finding.fact.startswith(words)
    found.clear()
    look(Machine(), settings, found, 1)
    (finding,) = [f for f in found if f.subject == "data"]
    assert finding.status == "wrong" and "record 3 (id r2): image 1 of 1" in finding.fact


def test_max_samples_counts_records(place):
    three_bad(place)
    dataset = loader(SKIP, f"{BASIC}.max_samples=4").dataset
    assert (len(dataset), dataset.records, len(dataset.skipped)) == (2, 4, 2)
    dataset = loader(SKIP, f"{BASIC}.max_samples=15", f"{BASIC}.dataset={FILE},{FILE}").dataset
    assert (len(dataset), dataset.records, len(dataset.skipped)) == (9 + 1, 15, 3 + 2)


def test_errors_of_a_whole_file_are_not_skipped(place):
    for file in (place / "data").glob("*.png"):
        file.unlink()
    for i in range(0, 12, 3):
        change(FILE, f"{i}.conversations", [])(place)
    with pytest.raises(
        RecordError, match=r"^data/a\.json: no records: all 12 are skipped, 8 image missing, 4 malf.*; first: "
    ):
        loader(SKIP)
    (place / FILE).write_text("Once\nupon\na time\n")
    with pytest.raises(RecordError, match=r"^data/a\.json, record 1: not JSON"):
        loader(SKIP)
    (place / FILE).write_text('[{"half')
    with pytest.raises(RecordError, match=r"^data/a\.json: not JSON"):
        loader(SKIP)
    with pytest.raises(SettingError, match="dataset_dir: nowhere: no such folder"):
        loader(SKIP, f"{BASIC}.dataset_dir=nowhere")


def test_broken_lines_are_skipped_one_by_one(place):
    records = json.loads((place / FILE).read_text())
    lines = [json.dumps(record) for record in records]
    (place / FILE).write_text("\n".join([*lines[:2], lines[2][:30], "[" * 5000, *lines[4:]]))
    dataset = loader(SKIP).dataset
    assert len(dataset) == 10 and dataset.skipped.kinds == {"not JSON": 2}
    assert dataset.skipped.first.startswith("data/a.json, record 3: not JSON: ") and dataset.source(2).startswith(
        f"{FILE}, record 5"
    )


# -- the cache -------------------------------------------------------------------------------------


def test_the_cache_keeps_the_skipped_records(place, monkeypatch):
    three_bad(place)
    cache = f"{BASIC}.cache_dir=cache"
    plain = loader(SKIP).report()
    assert loader(SKIP, cache).report() == plain
    with monkeypatch.context() as patch:
        patch.setattr(Preparation, "tokenise", None)  # any use would fail
        assert loader(SKIP, cache).report() == plain
        # cutoff_len is no part of what is kept
        assert len(loader(SKIP, cache, f"{BASIC}.cutoff_len=4000").dataset) == 10
    with pytest.raises(RecordError, match="record 3 "):  # the setting is part of the key
        loader(cache)
    Image.new("L", (50, 50)).save(place / "data/2.png")  # what was missing is there again
    dataset = loader(SKIP, cache).dataset
    assert len(dataset) == 10 and dataset.skipped.kinds == {"malformed": 1, "longer than cutoff_len": 1}


# -- images that break when they are decoded -------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_with_a_broken_image_becomes_padding(place, workers):
    """All other samples stay as they were, in order; the rest of the sequence is padding."""
    name = "data/1.png"
    Image.effect_noise((64, 64), 90).save(place / name)
    overrides = [SKIP, f"data.dataloader_param.num_workers={workers}", "training.micro_batch_size=2"]
    count = -(-loader().sequences_per_epoch // 2)
    before = batches(count, *overrides)
    cut(name, (place / name).stat().st_size // 2)(place)
    after, tokenizer, found = batches(count, *overrides), ChatTokenizer("hf"), 0
    for a, b in zip(before, after, strict=True):
        old, new = sequences(a), sequences(b)
        broken = [i for i, s in enumerate(old) if "What is 1?" in tokenizer.decode(s["input_ids"].tolist())]
        assert len(b.bad_records) == len(broken) and not a.bad_records
        for i in reversed(broken):
            found += 1
            assert len(old[i]["pixel_values"]) and (old.pop(i)["labels"] != IGNORE).any()
            assert re.fullmatch(
                r"data/a\.json, record 2 \(id r1\): .*/data/1\.png: cannot be read: .*", b.bad_records[0]
            )
        whole, kept = ([s for s in of if not s["is_pad"].any()] for of in (old, new))
        assert len(kept) == len(whole) and len(b.labels) == len(a.labels) == 2 * 160
        for mine, theirs in zip(kept, whole, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        for pad in [s for s in new if s["is_pad"].any()]:
            assert pad["is_pad"].all() and (pad["labels"] == IGNORE).all() and not len(pad["pixel_values"])
            assert pad["input_ids"].unique().tolist() == [tokenizer.pad_id]
            assert torch.equal(pad["position_ids"], torch.arange(len(pad["labels"])).expand(3, -1))
        assert len(b.label_positions) == sum(int((s["labels"] != IGNORE).sum()) for s in whole)
    assert found == 1
    with pytest.raises(RecordError, match=r"record 2 \(id r1\): .*1\.png: cannot be read"):
        batches(count, *overrides[1:])


def sequences(batch) -> list[dict[str, torch.Tensor]]:
    """The sequences of a batch, each with the patches of its image tokens."""
    found = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        rows = batch.vision_index[start:end]
        patches = [batch.pixel_values[4 * row : 4 * row + 4] for row in rows[rows >= 0].tolist()]
        found.append(
            {name: getattr(batch, name)[..., start:end] for name in ("input_ids", "labels", "position_ids", "is_pad")}
            | {"pixel_values": torch.cat([batch.pixel_values[:0], *patches])}
        )
    return found


def test_an_image_that_changed_makes_a_bad_record(place):
    cache = f"{BASIC}.cache_dir=cache"
    loader(SKIP, cache)
    Image.new("L", (150, 30)).save(place / "data/1.png")
    told = {message for batch in batches(8, SKIP, cache) for message in batch.bad_records}
    assert [message.rpartition(": ")[2] for message in told] == ["has changed since it was measured; empty cache_dir"]


def test_ranks_count_a_bad_record_each_time_and_name_it_once(place):
    """In two epochs on two ranks the record is met twice, counted twice and named once."""
    in_half("data/1.png")(place)
    in_half("data/2.png")(place)
    settings = ["training.train_iters=8", "training.log_interval=2", "data.dataloader_param.num_workers=1"]
    done = run(place, *launch(2), *settings, SKIP)
    assert (done.code, done.err) == (0, ""), done.err
    named = [line for line in done.out.splitlines() if line.startswith("not trained: ")]
    assert len(named) == 2 and all("cannot be read" in line for line in named)
    lines = read_metrics(place / "run/metrics.jsonl")
    epochs = 8 * 2 / loader(SKIP).sequences_per_epoch  # steps x ranks
    assert epochs >= 2 and 2 * int(epochs) <= sum(line["bad_records"] for line in lines) <= 2 * (int(epochs) + 1)
    stream = [iter(MicroBatches(load_settings("r.yaml", [SKIP]), rank, 2)) for rank in range(2)]
    expected = [sum(len(next(batches).bad_records) for batches in stream) for _ in range(8)]
    assert [line["bad_records"] for line in lines] == expected
    done = run(place, *launch(2), *settings, "training.save=other")
    assert done.code == 1 and done.err.count("\n") == 1
    assert re.match(r"error: data/a\.json, record [23] \(id r[12]\): .*/[12]\.png: cannot be read: ", done.err)


def test_ranks_that_see_different_images_stop(whole, place):
    """On nodes with different folders, each would leave out other records."""
    remove("data/1.png")(place)
    port = str(free_port())
    ranks = []
    for rank, folder in enumerate((whole, place)):
        places = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        ranks.append(begin(folder, *TRAIN, SKIP, f"training.save={place}/run", environment=places))
    for rank in ranks:
        done = finish(*rank)
        assert done.code == 1
        assert done.err.startswith("error: rank 1 found other samples than rank 0") and done.err.count("\n") == 1
    assert not (place / "run").exists()
