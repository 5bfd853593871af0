"""truncation: long samples are cut (never inside an image) or left out, and all are counted."""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizer_fixture import make_model_folder

from qwen35.config.load import from_flat
from qwen35.data import MicroBatches, RecordError
from qwen35.data.files import longest_context
from qwen35.data.preparation import Preparation
from qwen35.data.preview import show
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.truncation import truncate

BASIC = "data.dataset_param.basic_parameters"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """40 conversations of one to four turns with images, videos or none, and a model folder."""
    folder = tmp_path_factory.mktemp("long")
    make_model_folder(folder / "hf")
    rng = np.random.default_rng(3)
    for i, (width, height) in enumerate([(64, 64), (96, 64), (128, 96)]):
        Image.new("RGB", (width, height)).save(folder / f"{i}.png")
    records = []
    for i in range(40):
        images, videos, turns = [], [], []
        for turn in range(int(rng.integers(1, 5))):
            asked = "ask " * int(rng.integers(1, 9))
            for kind in rng.integers(0, 6, 2).tolist():
                if kind == 0:
                    asked += "<image>"
                    images.append(f"{rng.integers(3)}.png")
                if kind == 1:
                    asked += "so?<video>"
                    videos.append(["0.png"] * 4)
            thought = "<think>\nwell " + "well " * int(rng.integers(0, 9)) + "\n</think>\n\n" if i % 3 else ""
            answer = f"{thought}it is {turn}" + " indeed" * int(rng.integers(0, 9))
            turns += [{"role": "user", "content": asked + " say"}, {"role": "assistant", "content": answer}]
        records.append({"id": i, "images": images, "videos": videos, "messages": turns})
    (folder / "a.json").write_text(json.dumps(records))
    return folder


def flat_of(home, **flat):
    base = {
        "model.model_name_or_path": str(home / "hf"),
        f"{BASIC}.dataset": str(home / "a.json"),
        f"{BASIC}.dataset_dir": str(home),
        "data.dataloader_param.num_workers": 0,
        "data.dataloader_param.patch_bucket": 64,
        "training.train_iters": 1,
        "training.save": "unused",
    }
    return base | {f"{BASIC}.{name}": value for name, value in flat.items()}


def settings(home, **flat):
    return from_flat(flat_of(home, **flat))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 30}
MASKS = [
    {},
    {"mask_history": True},
    {"train_on_prompt": True},
    {"enable_thinking": True},
    {"enable_thinking": False, "template": "qwen3_vl_nothink"},
]


def in_vision(ids: list[int], tokenizer: ChatTokenizer) -> list[bool]:
    """Which tokens lie between the start and end of an image or of a pair of frames."""
    names = {token: tokenizer.decode([token]) for token in set(ids)}
    inside, out = False, []
    for token in ids:
        inside |= names[token] == "<|vision_start|>"
        out.append(inside)
        inside &= names[token] != "<|vision_end|>"
    return out


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_cut_sample_is_the_start_of_the_whole_one(home, mask):
    """It has the tokens, labels, positions and pixels up to the last label before the limit."""
    whole = MicroBatches(settings(home, **mask, multi_turn="joined", cutoff_len=4096), 0, 1).dataset
    tokenizer = ChatTokenizer(home / "hf")
    samples = {whole.source(i): whole[i] for i in range(len(whole))}
    for limit in (75, 150, 300):
        loader = MicroBatches(
            settings(home, **mask, multi_turn="joined", cutoff_len=limit, truncation="truncate"), 0, 1
        )
        ours, lost, seen = loader.dataset, [0, 0, 0], set()
        for i in range(len(ours)):
            sample, full = ours[i], samples[ours.source(i)]
            seen.add(ours.source(i))
            n, images = len(sample.input_ids), len(sample.grid_thw)
            lost[0] += len(full.input_ids) - n
            frames = full.grid_thw[images:, 0]  # pairs: 1 of an image, 2 of each video here
            lost[1] += int((frames == 1).sum())
            lost[2] += int((frames == 2).sum())
            assert n == ours.lengths[i] <= limit
            assert torch.equal(sample.input_ids, full.input_ids[:n])
            assert torch.equal(sample.position_ids, full.position_ids[:, :n])
            assert torch.equal(sample.labels[:-1], full.labels[: n - 1]) and sample.labels[-1] == -100
            assert torch.equal(sample.grid_thw, full.grid_thw[:images])
            assert torch.equal(sample.pixel_values, full.pixel_values[: len(sample.pixel_values)])
            assert len(sample.pixel_values) == int(sample.grid_thw.prod(-1).sum())
            assert int((sample.labels != -100).sum()) == (ours.label_tokens[i] - int(full.labels[-1] != -100))
            ids = full.input_ids.tolist()
            pads = sum(token in (tokenizer.image_id, tokenizer.video_id) for token in ids[:n])
            assert pads == int(sample.grid_thw.prod(-1).sum()) // 4  # each image and video whole, or not at all
            if n < len(ids):
                assert sample.labels[-2] != -100  # no token is computed for nothing
                # a label between the cut and the limit is only lost to an image or video
                within = full.labels[n - 1 : limit - 1] != -100
                assert not within.any() or any(in_vision(ids, tokenizer)[n:])
        left_out = [sample for source, sample in samples.items() if source not in seen]
        assert len(left_out) == len(ours.skipped)
        assert len(ours.skipped) == ours.skipped.kinds.get("nothing trained within cutoff_len", 0)
        vision = [any(in_vision(s.input_ids.tolist(), tokenizer)[:limit]) for s in left_out]
        for sample, has_vision in zip(left_out, vision, strict=True):
            assert has_vision or (sample.labels[: limit - 1] == -100).all()
        cut_ = ours.truncated
        assert [cut_.tokens, cut_.images, cut_.videos] == lost
        frames = torch.cat([ours[i].grid_thw[:, 0] for i in range(len(ours))])
        assert (ours.images, ours.videos) == (int((frames == 1).sum()), int((frames == 2).sum()))
        assert f", {ours.images} images, {ours.videos} videos; an epoch" in loader.report()
        images, videos = (f"{n} {what}" + "s" * (n != 1) for n, what in zip(lost[1:], ("image", "video"), strict=True))
        assert f" and {images}{f', {videos}' * (lost[2] > 0)} of theirs are not" in loader.report()


@pytest.mark.parametrize(
    ("text", "longest"),
    [
        ({}, float("inf")),
        ({"max_position_embeddings": 30}, 30),
        ({"max_position_embeddings": 30, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 30),
        # as vLLM has it: the trained length times the factor
        ({"max_position_embeddings": 30, "rope_parameters": YARN}, 120),
        ({"max_position_embeddings": 200, "rope_parameters": YARN}, 200),
        ({"max_position_embeddings": 30, "rope_scaling": YARN}, 120),
    ],
)
def test_samples_beyond_the_models_context_are_counted(home, tmp_path, text, longest):
    shutil.copytree(home / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    for section in (config | {"text_config": text}, config | text):  # and of a text-only model
        (tmp_path / "hf/config.json").write_text(json.dumps(section))
        assert longest_context(tmp_path / "hf") == longest
    loader = MicroBatches(
        from_flat(flat_of(home, cutoff_len=4096) | {"model.model_name_or_path": str(tmp_path / "hf")}), 0, 1
    )
    count = int((loader.dataset.lengths > longest).sum())
    told = [line for line in loader.warnings() if "max_position_embeddings" in line]
    assert len(told) == bool(count) == (longest < 1000)
    assert not told or told[0].startswith(
        f"data: {count} samples of more than {longest} tokens, which max_position_embe"
    )


def test_samples_that_vllm_would_refuse_by_the_tokenizers_limit_are_counted(home, tmp_path):
    """Other trainers leave the length that they trained with in a tokenizer's model_max_length."""
    shutil.copytree(home / "hf", tmp_path / "hf")
    file = tmp_path / "hf/tokenizer_config.json"
    names = json.loads(file.read_text())
    for limit, is_told in ((30, True), (int(1e30), False), (None, False)):
        file.write_text(json.dumps(names | {"model_max_length": limit}))
        settings = from_flat(flat_of(home, cutoff_len=4096) | {"model.model_name_or_path": str(tmp_path / "hf")})
        told = [line for line in MicroBatches(settings, 0, 1).warnings() if "model_max_length" in line]
        assert len(told) == is_told
        assert not told or re.match(r"data: \d+ samples of more than 30 tokens, which model_max_length of ", told[0])


def tokens(tokenizer, *parts):
    """ids and loss mask of parts: (text, trained), "image", or "video" (two pairs of frames)."""
    control = dict(zip(("start", "end", "vs", "pad", "ve"), tokenizer.control_ids, strict=True))
    ids, trained = [], []
    for part in parts:
        if part in ("image", "video"):
            run = [control["vs"], *[control["pad"] if part == "image" else tokenizer.video_id] * 3, control["ve"]]
            time = tokenizer.encode_text("<0.5 seconds>")
            new = run if part == "image" else time + run + time + run
            ids, trained = ids + new, trained + [False] * len(new)
        elif isinstance(part, str):
            ids, trained = [*ids, control[part]], [*trained, False]
        else:
            new = tokenizer.encode_text(part[0])
            ids, trained = ids + new, trained + [part[1]] * len(new)
    return np.array(ids), np.array(trained)


def test_every_limit(home):
    """Every cut is where it was worked out by hand."""
    tokenizer = ChatTokenizer(home / "hf")
    parts = ["start", ("user", False), "image", "end", "start", ("yes", True), "end", "start", ("so?", True), "video"]
    parts += ["image", "end", ("no", True), "end"]
    ids, trained = tokens(tokenizer, *parts)
    edges = np.cumsum([len(tokens(tokenizer, part)[0]) for part in parts]).tolist()
    grids = np.array([[1, 2, 6], [2, 2, 6], [1, 2, 6]])
    before, yes, answer, no = (edges[i] for i in (4, 5, 11, 12))
    for limit in range(1, len(ids) + 5):
        if limit <= before:
            expected = (0, 0)
        elif limit <= yes:
            expected = (limit, 1)
        elif limit <= answer:  # a video takes the text before it along, even a trained one
            expected = (yes, 1)
        elif limit <= no:
            expected = (limit, 3)
        else:
            expected = (no, 3)
        assert truncate(ids, trained, grids, limit, tokenizer) == expected, limit


def test_the_policies(home):
    with pytest.raises(RecordError, match=r"cutoff_len = 75 \(\d+ such records in all\); truncation: drop leaves such"):
        MicroBatches(settings(home, multi_turn="joined", cutoff_len=75), 0, 1)
    whole = MicroBatches(settings(home, multi_turn="joined", cutoff_len=4096), 0, 1)
    long = int((whole.dataset.lengths > 75).sum())
    dropped = MicroBatches(settings(home, multi_turn="joined", cutoff_len=75, truncation="drop"), 0, 1)
    assert len(dropped.dataset) == 40 - long and dropped.dataset.skipped.kinds == {"longer than cutoff_len": long}
    assert f"data: skipped {long} of 40 records: {long} longer than cutoff_len; first: " in dropped.report()
    cut_ = MicroBatches(settings(home, multi_turn="joined", cutoff_len=75, truncation="truncate"), 0, 1)
    none = len(cut_.dataset.skipped)
    assert 0 < none < long and len(cut_.dataset) == 40 - none
    assert f"\ndata: cut {long - none} samples to cutoff_len, " in cut_.report()
    assert cut_.label_share > 0
    skipped = MicroBatches(settings(home, multi_turn="joined", cutoff_len=75, on_bad_record="skip"), 0, 1)
    assert skipped.fingerprint == dropped.fingerprint != cut_.fingerprint  # the same samples, in the same bins
    anew = MicroBatches(settings(home, multi_turn="joined", cutoff_len=4096, truncation="truncate"), 0, 1)
    assert anew.fingerprint == whole.fingerprint and "cut" not in anew.report()  # nothing is too long
    for batch, _ in zip(cut_, range(cut_.sequences_per_epoch), strict=False):
        assert len(batch.input_ids) == 75


def test_of_a_record_of_several_samples_those_that_are_left_out_are_counted(home):
    samples = MicroBatches(settings(home, cutoff_len=4096), 0, 1).samples
    dropped = MicroBatches(settings(home, cutoff_len=75, truncation="drop"), 0, 1)
    long = samples - dropped.samples
    assert (
        samples > 40 and f"data: skipped {long} of {samples} samples of 40 records: {long} longer" in dropped.report()
    )


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_an_epoch_has_each_sample_as_often_as_its_weight(home, ranks, workers):
    """Also truncated ones, and for any number of ranks and workers."""
    (home / "b.json").write_text(json.dumps(json.loads((home / "a.json").read_text())[:15]))
    files = [str(home / "a.json"), {"file": str(home / "b.json"), "weight": 2.0}]
    s = settings(home, dataset=files, cutoff_len=150, truncation="truncate")
    s = replace(s, data=replace(s.data, dataloader_param=replace(s.data.dataloader_param, num_workers=workers)))
    loaders = [MicroBatches(s, rank, ranks) for rank in range(ranks)]
    dataset, count = loaders[0].dataset, loaders[0].sequences_per_epoch
    streams = [iter(loader) for loader in loaders]
    seen = []
    for number in range(count):
        batch = next(streams[number % ranks])
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            if not batch.is_pad[start]:
                seen.append((batch.input_ids[start:end].tolist(), batch.labels[start:end].tolist()))
    expected = []
    for i in range(len(dataset)):
        pair = (dataset[i].input_ids.tolist(), dataset[i].labels.tolist())
        expected += [pair] * (1 if dataset.source(i).startswith(f"{home}/a.json") else 2)
    assert dataset.truncated.numbers and sorted(seen) == sorted(expected)


def test_the_cache_serves_every_policy(home, tmp_path, monkeypatch):
    """It holds whole samples, which are truncated as they are read."""
    flat = {"cache_dir": str(tmp_path), "cutoff_len": 75}
    plain = MicroBatches(settings(home, **flat, truncation="truncate"), 0, 1)
    monkeypatch.setattr(Preparation, "tokenise", None)  # any use would fail
    again = MicroBatches(settings(home, **flat, truncation="truncate"), 0, 1)
    assert again.fingerprint == plain.fingerprint and again.report() == plain.report()
    assert "longer than cutoff_len" in MicroBatches(settings(home, **flat, truncation="drop"), 0, 1).report()
    with pytest.raises(RecordError, match="more than"):
        MicroBatches(settings(home, **flat), 0, 1)


def test_show_says_where_it_is_cut(home):
    for policy, words in (("truncate", "MORE THAN cutoff_len 75, cut to "), ("drop", "cutoff_len 75, left out")):
        texts = list(show(settings(home, cutoff_len=75, truncation=policy), 40, colour=False))
        assert any(words in text for text in texts)
