"""Files are tokenised by several processes and machines into the same bytes as by one."""

import gc
import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizer_fixture import make_model_folder

from qwen35.config.load import from_flat
from qwen35.data import RecordError, shards
from qwen35.data import tokenized as module
from qwen35.data.data_warnings import DataWarnings, Skipped
from qwen35.data.preparation import Preparation
from qwen35.data.samples import TENSORS, Collected, read_samples, write_samples
from qwen35.data.tokenized import load_samples, make_samples, tokenised, visual_to_json, workers_for
from qwen35.errors import UserError

BASIC = "data.dataset_param.basic_parameters"
RECORDS = 90
tokenise = Preparation.tokenise


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """90 records in shards of 12: of one to three questions, with an image or none; one is bad."""
    monkeypatch.setattr(module, "RECORDS_PER_JOB", 4)
    monkeypatch.setattr(module, "JOBS_PER_SHARD", 3)
    draw = random.Random(0)
    Image.new("L", (40, 70)).save(tmp_path / "a.png")
    records = []
    for i in range(RECORDS):
        turns = []
        for number in range(draw.randint(1, 3)):
            image = "<image>" * (i % 3 == 0 and number == 0)
            turns.append({"from": "human", "value": f"{image}What is {i}? {'really ' * draw.randint(0, 5)}"})
            turns.append({"from": "gpt", "value": f"It is {i}." if draw.random() < 0.9 else ""})
        records.append(
            {"id": i, "conversations": turns, f"odd{i % 30}": 1} | ({"image": "a.png"} if i % 3 == 0 else {})
        )
    records[50] = {"id": 50, "conversations": []}
    (tmp_path / "a.json").write_text(json.dumps(records))
    return tmp_path


def prepared(home, model, **flat):
    base = {
        "model.model_name_or_path": str(model),
        f"{BASIC}.dataset": str(home / "a.json"),
        f"{BASIC}.dataset_dir": str(home),
        f"{BASIC}.on_bad_record": "skip",
        f"{BASIC}.cache_dir": str(home / "cache"),
        "training.train_iters": 1,
        "training.save": "unused",
    }
    return Preparation.of(from_flat(base | flat))


def check(samples, file, preparation):
    """As one process has them that takes one record after the other."""
    skipped, warnings = Skipped(), DataWarnings()
    ids, mask, grids, lengths, counts, sources, visuals = [], [], [], [0], [0], [], []
    for _, parts in tokenised(file, preparation, skip=skipped.add, warnings=warnings):
        for part, sample in parts:
            ids += sample.ids.tolist()
            mask += sample.loss_mask.tolist()
            lengths.append(len(ids))
            grids += map(list, sample.grids)
            counts.append(len(grids))
            sources.append(part.source)
            visuals += [visual_to_json(*pair) for pair in zip(part.visuals, sample.extents, strict=True)]
    assert (samples.ids.tolist(), samples.loss_mask.tolist()) == (ids, mask) and len(ids) > 3000
    assert (samples.offsets.tolist(), samples.image_offsets.tolist()) == (lengths, counts)
    assert samples.grids.tolist() == grids and len(grids) > RECORDS // 3
    assert (list(samples.sources), list(samples.visuals)) == (sources, visuals)
    assert (samples.records, samples.skipped) == (RECORDS, skipped) and len(skipped) == 1
    counted = {kind: dict(found) for kind, found in samples.warnings.counts.items()}
    for kind, found in warnings.counts.items():
        if kind != "unread":  # beyond the first 20 names, those of one job are told together
            assert {name: tuple(count) for name, count in counted[kind].items()} == found
    assert sum(count for count, _ in counted["unread"].values()) == RECORDS - 1


@pytest.mark.parametrize("workers", [0, 2])
def test_several_processes_make_the_same_bytes(home, model, monkeypatch, workers):
    monkeypatch.setattr(module, "workers_for", lambda *_: workers)
    preparation, told = prepared(home, model), []
    check(
        load_samples(home / "a.json", preparation, None, lambda what, count: told.append(count)),
        home / "a.json",
        preparation,
    )
    assert sum(told) == RECORDS
    (entry,) = (home / "cache").iterdir()
    whole = entry.read_bytes()
    entry.unlink()
    monkeypatch.setattr(module, "workers_for", lambda *_: 0)
    check(make_samples(home / "a.json", preparation, None), home / "a.json", preparation)
    load_samples(home / "a.json", preparation, None)
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_error_of_a_file_is_reported(home, model, monkeypatch, workers):
    """However far another process, or the reader, has come."""
    monkeypatch.setattr(module, "workers_for", lambda *_: workers)
    records = json.loads((home / "a.json").read_text())
    records[7]["conversations"] = records[3]["conversations"] = "x"
    (home / "a.json").write_text(json.dumps(records)[:-40])  # cut off: not JSON
    for flat, message in (
        (
            {f"{BASIC}.on_bad_record": "error"},
            r"record 4 \(id 3\), conversations: is text, not a list of turns; on_bad",
        ),
        ({}, r"a\.json: not JSON"),
    ):
        with pytest.raises(RecordError, match=message):
            load_samples(home / "a.json", prepared(home, model, **flat), None)
        assert not (home / "cache").exists()


def test_a_process_that_dies_is_one_line(home, model, monkeypatch):
    monkeypatch.setattr(module, "workers_for", lambda *_: 2)
    monkeypatch.setattr(Preparation, "tokenise", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"^a worker process died before its work was done; .*taskset"):
        make_samples(home / "a.json", prepared(home, model), None)


def test_how_many_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    (tmp_path / "a").write_bytes(b"x" * (12 << 18))
    assert [workers_for(tmp_path / "a", limit, True) for limit in (None, 64 * 5 + 1, 70)] == [12, 5, 0]
    assert workers_for(tmp_path / "a", None, False) == 2
    (tmp_path / "a").write_bytes(b"x" * (2 << 18 - 1))
    assert workers_for(tmp_path / "a", None, True) == 0


# -- several machines with one cache_dir -----------------------------------------------------------


class Machines:
    """Forks that do not see each other's locks; each writes down the records that it tokenises."""

    def __init__(self, home, model, monkeypatch):
        self.home, self.model, self.patch = home, model, monkeypatch
        monkeypatch.setattr(module, "try_lock", lambda _: nullcontext(True))
        self.context = multiprocessing.get_context("fork")

    def start(self, name, dies_at=None, delay=0.0, gate=None):
        process = self.context.Process(target=self._run, args=(name, dies_at, delay, gate))
        process.start()
        return process

    def _run(self, name, dies_at, delay, gate):
        def slowly(preparation, record):
            number = int(record.source.split("record ")[1].split()[0])
            if number == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            with (self.home / f"{name}.log").open("a") as log:
                log.write(f"{number}\n")
            time.sleep(delay)
            return tokenise(preparation, record)

        shards.HOST = name
        self.patch.setattr(Preparation, "tokenise", slowly)
        if gate is not None:
            gate.wait(60)
        load_samples(self.home / "a.json", prepared(self.home, self.model), None)

    def made(self, name):
        path = self.home / f"{name}.log"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def check(self):
        (entry,) = (self.home / "cache").iterdir()  # and nothing else
        assert entry.suffix == ".safetensors"
        preparation = prepared(self.home, self.model)
        check(load_samples(self.home / "a.json", preparation, None), self.home / "a.json", preparation)


@pytest.fixture
def machines(home, model, monkeypatch):
    return Machines(home, model, monkeypatch)


GOOD = [number for number in range(1, RECORDS + 1) if number != 51]


def test_machines_share_the_work(machines):
    gate = machines.context.Barrier(3)
    started = [machines.start(name, delay=0.01, gate=gate) for name in "abc"]
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    made = [machines.made(name) for name in "abc"]
    assert sorted(chain(*made)) == GOOD and min(map(len, made)) >= 12
    machines.check()


def test_a_machine_that_dies_is_made_up_for(machines, monkeypatch):
    """Only what it has finished is taken, once its claim is old."""
    monkeypatch.setattr(shards, "CLAIM_TIMEOUT", 0.5)
    dead = machines.start("a", dies_at=30)
    dead.join(60)
    assert dead.exitcode == -signal.SIGKILL and machines.made("a") == list(range(1, 30))
    left = sorted(path.name for path in (machines.home / "cache").glob("*/*"))
    assert left == ["000000.claim", "000000.safetensors", "000001.claim", "000001.safetensors", "000002.claim"]
    other = machines.start("b")
    other.join(120)
    assert other.exitcode == 0
    assert sorted(machines.made("b")) == [number for number in GOOD if number > 24]
    machines.check()


def test_a_run_that_was_killed_goes_on_where_it_was(machines):
    for dies_at in (30, 80):
        machines.start("a", dies_at=dies_at).join(60)
    done = machines.start("a")
    done.join(60)
    assert done.exitcode == 0
    assert machines.made("a") == [*range(1, 30), *(n for n in range(25, 80) if n != 51), *range(73, RECORDS + 1)]
    machines.check()


def test_a_claim_lasts_while_it_is_kept(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(shards.time, "monotonic", lambda: clock[0])
    mine, other = shards.Shards(tmp_path / "a.safetensors"), shards.Shards(tmp_path / "a.safetensors")
    assert mine.claim(0) and mine.is_free(0)  # to this machine, whose lock it has
    monkeypatch.setattr(shards, "HOST", "another")
    for _ in range(5):
        assert not other.is_free(0) and not other.claim(0) and other.missing() == [0]
        clock[0] += 0.9 * shards.CLAIM_TIMEOUT
        time.sleep(0.02)  # a file's time is coarse
        mine.keep()
    assert not other.is_free(0)
    clock[0] += 1.1 * shards.CLAIM_TIMEOUT
    assert other.is_free(0) and other.claim(0)
    assert other.count == 1 and next(tmp_path.glob("*/*.claim")).read_text() == "another"


def test_damaged_shards_and_entries_are_one_line_and_made_anew(machines, caplog):
    machines.start("a", dies_at=30).join(60)
    damaged = next((machines.home / "cache").glob("*/000000.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-9] + bytes(9))
    shards.HOST, before = "a", shards.HOST
    preparation = prepared(machines.home, machines.model)
    check(load_samples(machines.home / "a.json", preparation, None), machines.home / "a.json", preparation)
    shards.HOST = before
    (line,) = caplog.messages
    assert line.endswith("000000.safetensors: is damaged, and made anew: its bytes are not those that were written")
    caplog.clear()
    (entry,) = (machines.home / "cache").iterdir()
    for wrong, why in ((lambda data: data[:-9] + bytes(9), "its bytes are not"), (lambda data: data[:100], "header")):
        whole = entry.read_bytes()
        entry.write_bytes(wrong(whole))
        load_samples(machines.home / "a.json", preparation, None)
        (line,) = caplog.messages
        assert line.startswith(f"{entry}: is damaged, and made anew: ") and why.lower() in line.lower()
        caplog.clear()
        assert entry.read_bytes() == whole
    load_samples(machines.home / "a.json", preparation, None)
    assert caplog.messages == []


# -- memory ----------------------------------------------------------------------------------------


def entry_of(path: Path, count: int) -> Path:
    made = Collected(DataWarnings())
    for i in range(count):
        made.add(ids=np.full(5, i, np.int32).data, loss_mask=np.ones(5, bool).data, offsets=5)
        made.add(grids=[(1, 2, 2)], image_offsets=1)
        made.add_values("source", [f"data/a.json, record {i} (id {i})"])
        made.add_values("visual", [f"/data/images/{i:09}.jpg"])
    write_samples(made.samples("a.json"), path)
    return path


def written_by_a_worker(work_on) -> int:
    """KiB of its parent's memory that a forked process has to copy while it reads."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe()

    def dirty():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

    def work():
        gc.disable()
        before = dirty()
        work_on()
        send.send(dirty() - before)

    process = context.Process(target=work)
    process.start()
    process.join(60)
    return receive.recv()


def read(samples, picked, sources, visuals):
    for i in picked:
        assert sources[i].endswith(f"(id {i})") and visuals[i : i + 1][0].endswith(f"{i:09}.jpg")
        assert int(samples.ids[5 * i]) == i


def test_memory_of_a_worker_does_not_grow_with_the_records(tmp_path):
    """And the lists of objects that were there instead make this test fail."""
    grown = {}
    for count in (2_000, 40_000):
        samples = read_samples(entry_of(tmp_path / f"{count}.safetensors", count))
        sources, visuals = samples.sources, samples.visuals
        assert len(sources) == count and sources[-1] == f"data/a.json, record {count - 1} (id {count - 1})"
        picked = range(0, count, count // 2_000)
        grown[count] = [
            written_by_a_worker(partial(read, samples, picked, *values))
            for values in ((sources, visuals), (list(sources), list(visuals)))
        ]
    assert grown[40_000][0] - grown[2_000][0] < 600, grown
    assert grown[40_000][1] - grown[2_000][1] > 3_000, grown


def test_values(tmp_path):
    made = Collected(DataWarnings())
    given = ["a.jpg", {"source": ["é", "\udcff"], "fps": None}, "", "{x", {"source": "v.mp4"}]
    made.add_values("visual", given)
    values = made.samples("x").visuals
    assert list(values) == given and values[1:3] == given[1:3] and values[-1] == given[-1] and len(values) == 5
    assert (values.objects(), values.objects(0, 2), values.objects(2, 4), values.objects(5)) == (2, 1, 0, 0)
    with pytest.raises(IndexError):
        values[5]
    empty = Collected(DataWarnings()).samples("x")
    assert len(empty.sources) == 0 and list(empty.visuals) == [] and empty.visuals.objects() == 0
    assert empty.grids.shape == (0, 3) and {name: getattr(empty, name).dtype for name in TENSORS} == TENSORS
    both = Collected(DataWarnings())
    for _ in range(2):
        both.extend(Collected.of(made.samples("x")))
    assert list(both.samples("x").visuals) == given * 2
    assert torch.equal(both.samples("x").source_offsets, torch.zeros(1, dtype=torch.int64))
