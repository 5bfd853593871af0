"""From a recipe to packed batches: their fields, the cache of tokens, the workers, and errors."""

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from contextlib import nullcontext
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tokenizer_fixture import make_model_folder

from qwen35.batch import PackedBatch
from qwen35.config.load import SettingError, from_flat, to_yaml
from qwen35.data import MicroBatches, RecordError
from qwen35.data import tokenized as module
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.files import try_lock
from qwen35.data.formats import read_records
from qwen35.data.media import ImageFolder
from qwen35.data.packing import moved_forward
from qwen35.data.preparation import Preparation, TokenisedSample
from qwen35.data.samples import write_samples
from qwen35.data.tokenized import load_samples, make_samples
from qwen35.data.tokenizer import ChatTokenizer

ROOT = Path(__file__).parents[2]
CUTOFF = 128
BASIC = "data.dataset_param.basic_parameters"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def home(tmp_path):
    """Two files below tmp_path: 30 records with one or two images or none, and 10 of text."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(30):
        names = []
        for j in range(i % 3):
            names.append(f"./pics/{i}_{j}.png")
            (tmp_path / "pics").mkdir(exist_ok=True)
            size = rng.integers(20, 150, 2)
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / names[-1])
        text = "<image>" * len(names) + f"\nWhat is {i}? " + "really " * int(rng.integers(0, 6))
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": f"It is {i}."}]
        records.append({"id": i, "images": names, "messages": turns})
    (tmp_path / "a.json").write_text(json.dumps(records))
    text = [
        {"conversations": [{"from": "human", "value": f"Hi {i}"}, {"from": "gpt", "value": "Yo"}]} for i in range(10)
    ]
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, text)))
    return tmp_path


def settings(home, model, **flat):
    base = {
        "model.model_name_or_path": str(model),
        f"{BASIC}.dataset": f"{home}/a.json,{home}/b.json",
        f"{BASIC}.dataset_dir": str(home),
        f"{BASIC}.cutoff_len": CUTOFF,
        "data.dataset_param.preprocess_parameters.image_max_pixels": 8192,
        "data.dataloader_param.num_workers": 0,
        "data.dataloader_param.patch_bucket": 64,
        "training.train_iters": 10,
        "training.save": "unused",
    }
    return from_flat(base | flat)


def batches(n, s, rank=0, world_size=1, start_step=0):
    return list(islice(MicroBatches(s, rank, world_size, start_step), n))


def same(a: PackedBatch, b: PackedBatch) -> bool:
    names = ("input_ids", "labels", "position_ids", "cu_seqlens", "pixel_values", "grid_thw", "vision_index", "is_pad")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def sequences(batch):
    """(ids, labels, is_pad) of each sequence."""
    edges = batch.cu_seqlens.tolist()
    return [
        (batch.input_ids[a:b].tolist(), batch.labels[a:b].tolist(), batch.is_pad[a:b].tolist())
        for a, b in pairwise(edges)
    ]


def test_fields_of_a_batch_agree(home, model):
    s = settings(home, model, **{"training.micro_batch_size": 2})
    tokenizer = ChatTokenizer(model)
    loader = MicroBatches(s, 0, 1)
    for batch in islice(loader, 6):
        T = 2 * CUTOFF
        assert batch.input_ids.shape == batch.labels.shape == batch.is_pad.shape == (T,)
        assert batch.label_positions.tolist() == [t for t, label in enumerate(batch.labels.tolist()) if label != -100]
        assert batch.position_ids.shape == (3, T)
        assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[[0, -1]].tolist() == [0, T]
        assert CUTOFF in batch.cu_seqlens  # no sequence crosses the border of packed sequences
        assert len(batch.pixel_values) % 64 == 0 and len(batch.pixel_values) == int(batch.grid_thw.prod(-1).sum())
        assert int(batch.vision.cu_seqlens[-1]) == len(batch.pixel_values)
        image_tokens = batch.input_ids == tokenizer.image_id
        assert torch.equal(batch.vision_index[image_tokens], torch.arange(int(image_tokens.sum())))
        assert (batch.vision_index[~image_tokens] == -1).all()
        for edge in batch.cu_seqlens[:-1].tolist():
            assert batch.position_ids[:, edge].tolist() == [0, 0, 0]
        for ids, labels, pad in sequences(batch):
            assert labels[-1] == -100
            if pad[0]:
                assert all(pad) and set(ids) == {tokenizer.pad_id} and set(labels) == {-100}
                continue
            assert not any(pad)
            assert all(label in (-100, ids[t + 1]) for t, label in enumerate(labels[:-1]))
            assert any(label == tokenizer.im_end_id for label in labels)


def test_positions_of_pads_start_at_zero(home, model):
    batch = batches(1, settings(home, model, **{f"{BASIC}.dataset": f"{home}/b.json", f"{BASIC}.max_samples": 1}))[0]
    start = int(batch.cu_seqlens[1])
    assert len(batch.cu_seqlens) == 3
    assert torch.equal(batch.position_ids[:, start:], torch.arange(CUTOFF - start).expand(3, -1))


def test_patches_are_those_of_their_tokens(home, model):
    """Each sequence has the features of its own record, whatever it is packed with."""
    s = settings(home, model)
    preparation = Preparation.of(s)
    expected = {}
    for record in read_records(home / "a.json", preparation.attr, ImageFolder(home)):
        ((record, sample),) = preparation.tokenise(record)
        ids = sample.ids
        expected[tuple(ids.tolist())] = [preparation.images.patches(path)[0] for path in record.images]
    seen = 0
    for batch in batches(20, s):
        for (ids, _, pad), start in zip(sequences(batch), batch.cu_seqlens.tolist(), strict=False):
            images = expected.get(tuple(ids), [])
            rows = batch.vision_index[start : start + len(ids)]
            rows = rows[rows >= 0]
            if pad[0] or not len(rows):
                continue
            seen += 1
            first = int(rows[0]) * 4
            assert torch.equal(batch.pixel_values[first : first + len(rows) * 4], torch.cat(images))
    assert seen >= 10


def test_batch_without_images_has_only_the_dummy(home, model):
    batch = batches(1, settings(home, model, **{f"{BASIC}.dataset": f"{home}/b.json"}))[0]
    assert batch.grid_thw.tolist() == [[1, 2, 32]]
    assert batch.pixel_values.shape == (64, 1536) and not batch.pixel_values.any()
    assert (batch.vision_index == -1).all()


@pytest.mark.parametrize("bucket", [2, 6, 63])
def test_patch_bucket_must_hold_whole_merge_blocks(home, model, bucket):
    with pytest.raises(SettingError, match=rf"patch_bucket: {bucket} must be a multiple of 4, at least 4"):
        MicroBatches(settings(home, model, **{"data.dataloader_param.patch_bucket": bucket}), 0, 1)


def test_batches_do_not_depend_on_workers_ranks_or_resuming(home, model):
    s = settings(home, model, **{"training.gradient_accumulation_steps": 2})
    one = batches(24, s)
    assert not same(one[0], one[1])
    workers = settings(
        home, model, **{"training.gradient_accumulation_steps": 2, "data.dataloader_param.num_workers": 2}
    )
    assert all(map(same, batches(24, workers), one))
    first, second = batches(12, s, 0, 2), batches(12, s, 1, 2)
    interleaved = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert all(map(same, interleaved, one))
    assert all(map(same, batches(4, s, 1, 2, start_step=4), second[8:]))


def test_each_sample_comes_once_an_epoch(home, model):
    s = settings(home, model)
    loader = MicroBatches(s, 0, 1)
    assert (loader.samples, loader.dataset.images) == (40, 30)
    seen = [
        ids for batch in islice(loader, loader.sequences_per_epoch) for ids, _, pad in sequences(batch) if not pad[0]
    ]
    assert len(seen) == 40 and sum(map(len, seen)) == loader.tokens_per_epoch
    assert loader.report() == (
        f"data: 40 samples of 2 files, 30 images; an epoch is {loader.tokens_per_epoch:,} tokens "
        f"({loader.dataset.label_tokens.sum() / loader.tokens_per_epoch:.1%} trained) in "
        f"{loader.sequences_per_epoch} packed sequences of {CUTOFF} ({loader.real_share:.1%} real tokens)"
    )


@pytest.mark.parametrize(("ranks", "micro", "accumulated"), [(1, 1, 1), (2, 2, 1), (3, 1, 3)])
def test_a_run_of_epochs_shows_each_sample_so_often(home, model, ranks, micro, accumulated):
    """By its tokens, over all ranks, after each epoch's last step; from any step on."""
    flat = {"training.micro_batch_size": micro, "training.gradient_accumulation_steps": accumulated}
    s = settings(home, model, **{"training.train_iters": None, "training.train_epochs": 3} | flat)
    loaders = [MicroBatches(s, rank, ranks) for rank in range(ranks)]
    packed, per_step = loaders[0].packed_sequences, ranks * micro * accumulated
    ends = [packed.steps(epochs, per_step) for epochs in (1, 2, 3)]
    assert ends[2] > 3 and (per_step == 1 or len(packed.epoch(0)) % per_step)
    streams, seen = [iter(loader) for loader in loaders], Counter()
    once = Counter(tuple(loaders[0].dataset[number].input_ids.tolist()) for number in range(40))
    for step in range(ends[2]):
        step_batches = [next(stream) for stream in streams for _ in range(accumulated)]
        seen.update(tuple(ids) for batch in step_batches for ids, _, pad in sequences(batch) if not pad[0])
        if step + 1 in ends:
            assert seen == Counter({ids: count * (1 + ends.index(step + 1)) for ids, count in once.items()})
    for rank, loader in enumerate(loaders):
        second = list(islice(loader, ends[0] * accumulated, (ends[0] + 1) * accumulated))
        assert all(map(same, batches(accumulated, s, rank, ranks, start_step=ends[0]), second))


def test_a_report_says_how_packing_departs_from_the_files_order(home, model):
    shuffled = MicroBatches(settings(home, model), 0, 1)
    ordered = MicroBatches(settings(home, model, **{"data.dataloader_param.shuffle": False}), 0, 1)
    moved, farthest = moved_forward(ordered.packed_sequences.epoch(0))
    assert moved > 1 and farthest >= 1
    assert f"shuffle: false keeps the files' order, but packing takes {moved} samples forward" in ordered.report()
    assert "shuffle" not in shuffled.report()


def test_max_samples_counts_over_all_files_in_order(home, model):
    for n, files in ((7, 1), (30, 1), (35, 2), (99, 2)):
        dataset = MicroBatches(settings(home, model, **{f"{BASIC}.max_samples": n}), 0, 1).dataset
        assert len(dataset) == min(n, 40) and len(dataset.files) == files
    assert dataset.source(6).endswith("a.json, record 7 (id 6)")
    assert dataset.source(30).endswith("b.json, record 1")


def test_worker_hands_over_a_batch_in_shared_memory(home, model):
    """All tensors, empty ones too; nothing is copied through a pipe, and the rest is as it was."""
    s = settings(home, model, **{"data.dataloader_param.num_workers": 1})
    for batch, plain in zip(batches(3, s), batches(3, settings(home, model)), strict=True):
        tensors = [getattr(of, f.name) for of in (batch, batch.vision) for f in dataclasses.fields(of)]
        tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        assert len(tensors) == 14 and all(tensor.is_shared() and tensor.is_contiguous() for tensor in tensors)
        assert same(batch, plain) and batch.bad_records == ()


@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_lock_exactly_what_moves(home, model, monkeypatch, workers):
    """All that `to` moves is locked, and nothing else; a CPU plays the accelerator."""
    locked = []

    def pin(tensor):
        locked.append(tensor.clone())
        return locked[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for name, value in (
        ("is_available", True),
        ("current_accelerator", torch.device("cpu")),
        ("current_device_index", 0),
        ("set_device_index", None),
    ):
        monkeypatch.setattr(torch.accelerator, name, lambda *_, value=value, **__: value)
    s = settings(home, model, **{"data.dataloader_param.num_workers": workers})
    plain = batches(3, s)
    assert not locked
    for batch, wanted in zip(islice(MicroBatches(s, 0, 1, pin=True), 3), plain, strict=True):
        assert same(batch, wanted)
        names = ("input_ids", "labels", "position_ids", "pixel_values", "vision_index", "is_pad", "label_positions")
        moved = [getattr(batch, name) for name in names]
        moved += [batch.vision.position, batch.vision.corner, batch.vision.corner_weight]
        read = [batch.cu_seqlens, batch.grid_thw, batch.vision.cu_seqlens]
        here = {tensor.data_ptr() for tensor in locked}
        assert [tensor.data_ptr() in here for tensor in moved + read] == [True] * len(moved) + [False] * len(read)


def test_loader_does_not_advance_the_global_random_state(home, model):
    before = torch.get_rng_state()
    batches(2, settings(home, model))
    assert torch.equal(torch.get_rng_state(), before)


# -- errors ----------------------------------------------------------------------------------------


def test_sample_over_cutoff_len_is_an_error(home, model):
    with pytest.raises(
        RecordError, match=r"a\.json, record \d+ \(id \d+\): \d+ tokens, more than .*cutoff_len = 40 \(\d+"
    ):
        MicroBatches(settings(home, model, **{f"{BASIC}.cutoff_len": 40}), 0, 1)


def test_missing_image_is_an_error_at_the_start(home, model):
    (home / "pics" / "1_0.png").unlink()
    wanted = r"a\.json, record 2 \(id 1\): image 1 of 1, .*/pics/1_0\.png: no such file, dataset_dir is "
    with pytest.raises(RecordError, match=wanted):
        MicroBatches(settings(home, model), 0, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_an_error_when_it_is_decoded(home, model, workers):
    path = home / "pics" / "1_0.png"
    path.write_bytes(path.read_bytes()[:200])
    s = settings(home, model, **{"data.dataloader_param.num_workers": workers})
    with pytest.raises(RecordError, match=r"record 2 \(id 1\): .*1_0\.png: cannot be read") as caught:
        batches(40, s)
    assert "\n" not in str(caught.value)


def test_file_without_records_is_an_error(home, model):
    (home / "empty.json").write_text("[]")
    with pytest.raises(RecordError, match=r"empty\.json: no records$"):
        MicroBatches(settings(home, model, **{f"{BASIC}.dataset": f"{home}/empty.json"}), 0, 1)


def test_model_and_processor_must_agree(home, model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    for change, message in [
        ({"image_token_id": 5}, r"<\|image_pad\|> is token \d+ in .*tokenizer\.json, but image_token_id is 5"),
        ({"vision_config": {"num_position_embeddings": 4, "spatial_merge_size": 1}}, "merge_size is 2 in .* is 1 in"),
        ({"vision_config": {}}, r"config\.json: has no num_position_embeddings"),
    ]:
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "config.json").write_text(json.dumps(config | change))
        s = settings(
            home,
            model,
            **{
                "model.model_name_or_path": str(other),
                "data.dataset_param.preprocess_parameters.model_name_or_path": str(model),
            },
        )
        with pytest.raises(SettingError, match=message):
            MicroBatches(s, 0, 1)


# -- cache -----------------------------------------------------------------------------------------


def test_cache_is_used_and_gives_the_same_batches(home, model, monkeypatch):
    s = settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")})
    plain = batches(12, settings(home, model))
    assert all(map(same, batches(12, s), plain))
    assert len(list((home / "cache").iterdir())) == 2
    monkeypatch.setattr(Preparation, "tokenise", None)  # any use would fail
    assert all(map(same, batches(12, s), plain))
    assert MicroBatches(s, 0, 1).dataset.source(3).endswith("record 4 (id 3)")


def test_changed_file_setting_or_code_makes_a_new_cache_entry(home, model, monkeypatch):
    def entries(**flat):
        MicroBatches(settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache"), **flat}), 0, 1)
        return len(list((home / "cache").iterdir()))

    assert entries() == 2
    assert entries(**{f"{BASIC}.cutoff_len": 256, "training.seed": 7}) == 2
    assert entries(**{f"{BASIC}.train_on_prompt": True}) == 4
    assert entries(**{"data.dataset_param.preprocess_parameters.image_max_pixels": 4096}) == 6
    assert entries(**{f"{BASIC}.max_samples": 35}) == 8
    (home / "b.json").write_text((home / "b.json").read_text() + " ")
    assert entries() == 9
    module = sys.modules["qwen35.data.preparation"]
    assert {"content.py", "template.py", "tokenizer.py", "tokenized.py"} < {path.name for path in module.CODE_FILES}
    shutil.copy(module.CODE_FILES[-1], home / "code.py")
    monkeypatch.setattr(module, "CODE_FILES", [*module.CODE_FILES[:-1], home / "code.py"])
    assert entries() == 9
    (home / "code.py").write_text((home / "code.py").read_text() + "\n")
    assert entries() == 11


def test_damaged_cache_entry_is_made_again(home, model):
    s = settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")})
    plain = batches(3, s)
    for damage in (_truncated, _names_lost):
        for file in (home / "cache").iterdir():
            whole = file.read_bytes()
            file.write_bytes(damage(whole))
        assert all(map(same, batches(3, s), plain))
        assert file.read_bytes() == whole


def _truncated(data: bytes) -> bytes:
    return data[:100]


def _names_lost(data: bytes) -> bytes:
    """Zeros, as in a block of a disk that was never written."""
    end = 8 + int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8:end])["names"]["data_offsets"]
    return data[: end + start] + bytes(stop - start) + data[end + stop :]


def test_first_of_several_cache_entries_stays(home, model, monkeypatch):
    """Another machine's entry, made while this one tokenises, stays: it may be mapped already."""
    monkeypatch.setattr(module, "try_lock", lambda _: nullcontext(True))  # the other machine does not see the lock
    s = settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")})
    preparation, entries = Preparation.of(s), []

    def late(samples, path):
        if not entries:  # the other machine, meanwhile
            write_samples(samples, path)
            entries.append(path.stat().st_ino)
        write_samples(samples, path)

    monkeypatch.setattr(module, "write_samples", late)
    load_samples(home / "a.json", preparation, None)
    (entry,) = (home / "cache").iterdir()
    assert entry.stat().st_ino == entries[0]


def test_cache_works_without_hard_links(home, model, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", link)
    s = settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")})
    load_samples(home / "a.json", Preparation.of(s), None)
    assert len(list((home / "cache").iterdir())) == 1
    monkeypatch.setattr(Preparation, "tokenise", None)
    assert len(load_samples(home / "a.json", Preparation.of(s), None).sources) == 30


def fork(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def write_cache(s, home):
    load_samples(home / "a.json", Preparation.of(s), None)


def test_several_processes_write_one_cache_entry(home, model):
    s = settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")})
    for process in [fork(write_cache, s, home) for _ in range(3)]:
        process.join(300)
        assert process.exitcode == 0
    (entry,) = (home / "cache").iterdir()  # nothing temporary is left
    assert entry.suffix == ".safetensors"


def test_one_process_tokenises_and_the_others_wait(home, model, monkeypatch):
    s = settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")})
    made, waits = make_samples(home / "a.json", Preparation.of(s), None), multiprocessing.Event()
    monkeypatch.setattr(module, "_make_shared", None)  # any use would fail
    monkeypatch.setattr(module.time, "sleep", lambda _: waits.set())
    with try_lock(home / "cache") as has_lock:
        assert has_lock
        other = fork(write_cache, s, home)
        assert waits.wait(60)
        write_samples(made, home / "cache" / f"a-{Preparation.of(s).cache_key(home / 'a.json', None)}.safetensors")
        other.join(60)  # the entry is enough: the lock may be held for another entry
    assert other.exitcode == 0


def test_waiting_process_takes_over_from_a_killed_one(home, model, monkeypatch):
    s = settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")})
    begun, waits = multiprocessing.Event(), multiprocessing.Event()

    def never_done(*_):
        begun.set()
        signal.pause()

    with monkeypatch.context() as patched:
        patched.setattr(module, "_make_shared", never_done)
        killed = fork(write_cache, s, home)
        assert begun.wait(60)
    monkeypatch.setattr(module.time, "sleep", lambda _: waits.set())
    other = fork(write_cache, s, home)
    assert waits.wait(60) and other.is_alive()
    killed.kill()
    other.join(60)
    assert other.exitcode == 0 and len(list((home / "cache").iterdir())) == 1


def test_cache_works_without_file_locks(home, model, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    write_cache(settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")}), home)
    assert len(list((home / "cache").iterdir())) == 1


def test_bad_records_leave_no_cache_folder(home, model):
    (home / "pics/1_0.png").unlink()
    with pytest.raises(RecordError, match=r"1_0\.png"):
        write_cache(settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")}), home)
    assert not (home / "cache").exists()


def test_new_samples_are_mapped_from_their_cache_entry(home, model):
    s = settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")})
    samples = load_samples(home / "a.json", Preparation.of(s), None)
    (entry,) = (home / "cache").iterdir()
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in lines if str(entry) in line]
    assert any(int(start, 16) <= samples.ids.data_ptr() < int(end, 16) for start, end in mapped)


def test_samples_are_in_memory_once_while_they_are_made(home, model, monkeypatch):
    def tokenise(_, record):
        extents = [1] * len(record.visuals)
        ids, mask = np.ones(200_000, dtype=np.int32), np.ones(200_000, dtype=bool)
        return [(record, TokenisedSample(ids, mask, [], extents=extents))]

    preparation = Preparation.of(settings(home, model))
    monkeypatch.setattr(Preparation, "tokenise", tokenise)
    monkeypatch.setattr(module, "RECORDS_PER_JOB", 1)  # a job's samples are there twice, and weigh little in practice
    tracemalloc.start()
    samples = make_samples(home / "a.json", preparation, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = samples.ids.nbytes + samples.loss_mask.nbytes
    assert size == 30 * 200_000 * 5 and peak < 1.3 * size


def test_changed_image_is_an_error(home, model):
    s = settings(home, model, **{f"{BASIC}.cache_dir": str(home / "cache")})
    batches(1, s)
    Image.new("RGB", (300, 30)).save(home / "pics" / "1_0.png")
    with pytest.raises(RecordError, match=r"1_0\.png: has changed since it was measured; empty cache_dir"):
        batches(40, s)


def test_unwritable_cache_dir_is_an_error(home, model):
    (home / "file").write_text("")
    with pytest.raises(SettingError, match=r"basic_parameters\.cache_dir: .*file: "):
        MicroBatches(settings(home, model, **{f"{BASIC}.cache_dir": str(home / "file")}), 0, 1)


# -- generation and workers ------------------------------------------------------------------------


def test_prompt_batch_ends_where_the_answer_begins(home, model):
    s = settings(home, model)
    preparation, spec = Preparation.of(s), vision_spec(model)
    records = list(read_records(home / "a.json", preparation.attr, ImageFolder(home)))
    batch = prompt_batch(records[2], preparation, spec, thinking=False)
    ((_, sample),) = preparation.tokenise(records[2])
    n = len(batch.input_ids)
    assert batch.input_ids.tolist() == sample.ids[:n].tolist()
    assert sample.loss_mask[n:].all() and not sample.loss_mask[:n].any()
    assert batch.cu_seqlens.tolist() == [0, n] and batch.is_pad is None
    assert int((batch.vision_index >= 0).sum()) * 4 == len(batch.pixel_values)
    text_only = prompt_batch(records[0], preparation, spec, thinking=False)
    assert len(text_only.pixel_values) == 4 and not text_only.pixel_values.any()


def test_memory_does_not_grow_from_epoch_to_epoch(home, model):
    """Over ten epochs of megabytes each, neither the process nor its worker keeps old batches."""
    loader = MicroBatches(settings(home, model, **{"data.dataloader_param.num_workers": 1}), 0, 1)
    stream, own = iter(loader), psutil.Process()
    before = {child.pid for child in own.children()}

    def epoch() -> int:
        return sum(batch.pixel_values.nbytes for batch in islice(stream, loader.sequences_per_epoch))

    def in_use() -> list[int]:
        (worker,) = (child for child in own.children() if child.pid not in before)
        return [process.memory_full_info().uss for process in (own, worker)]

    for _ in range(2):
        epoch()
    first = in_use()
    passed = sum(epoch() for _ in range(8))
    assert passed > 20e6
    assert [last - start < 0.1 * passed for start, last in zip(first, in_use(), strict=True)] == [True, True]


WATCHED = """
import sys, time
from qwen35.config.load import load_settings
from qwen35.data import MicroBatches
stream = iter(MicroBatches(load_settings(sys.argv[1]), 0, 1))
next(stream)
from multiprocessing import active_children
print(*[child.pid for child in active_children()], flush=True)
time.sleep(60)
"""


def test_workers_die_with_their_parent(home, model):
    s = settings(home, model, **{"data.dataloader_param.num_workers": 2})
    (home / "run.yaml").write_text(to_yaml(s))
    parent = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(home / "run.yaml")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 300
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


ENDS = """
import os, signal, sys
from multiprocessing import active_children
from qwen35.config.load import load_settings
from qwen35.data import MicroBatches
stream = iter(MicroBatches(load_settings(sys.argv[1]), 0, 1))
next(stream)
workers = active_children()
os.system(f"kill -TERM {' '.join(str(worker.pid) for worker in workers)}")  # from another process
for _ in range(20):
    next(stream)
print(*[worker.pid for worker in workers], all(worker.is_alive() for worker in workers))
"""


def test_script_ends_at_once_and_its_workers_with_it(home, model):
    """The workers ignore a SIGTERM of anybody but their parent: it may be for the whole job."""
    s = settings(home, model, **{"data.dataloader_param.num_workers": 2})
    (home / "run.yaml").write_text(to_yaml(s))
    command = [sys.executable, "-c", ENDS, str(home / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    *pids, are_alive = done.stdout.split()
    assert (done.returncode, done.stderr, are_alive, len(pids)) == (0, "", "True", 2)
    assert not any(map(is_running, map(int, pids)))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
