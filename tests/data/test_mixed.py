"""Images, videos and tools of several files with weights, from the recipe to the packed batch."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from mistakes import BASIC, SHOW, place, run, whole
from optional import write_video
from PIL import Image

from qwen35.config.load import load_settings
from qwen35.data import MicroBatches
from qwen35.data.record import RecordError
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.errors import SettingError
from qwen35.model.config import differences

__all__ = ["place", "whole"]  # fixtures


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "data/v").mkdir()
    for i in range(3):
        Image.effect_noise((40, 48), 90).save(place / f"data/v/{i}.png")
    record = {
        "id": "v",
        "messages": [
            {"role": "user", "content": [{"type": "video", "video": "v"}, {"type": "image", "image": "1.png"}]},
            {"role": "assistant", "content": "A film."},
        ],
    }
    (place / "data/b.json").write_text(json.dumps([record, record | {"id": "w"}]))


def loader(*overrides):
    return MicroBatches(load_settings("r.yaml", overrides), 0, 1)


def test_videos_reach_the_batch(place):
    batches = loader(f"{BASIC}.dataset=data/b.json", f"{BASIC}.cache_dir=cache")
    batch = next(iter(batches))
    tokenizer = ChatTokenizer("hf")
    video = batch.input_ids == tokenizer.video_id
    samples = int((batch.input_ids == tokenizer.im_end_id).sum()) // 2
    assert samples and batch.grid_thw[: 2 * samples].tolist() == [[2, 4, 2], [1, 2, 2]] * samples
    assert int(video.sum()) == 4 * samples and not (batch.labels[:-1][video[1:]] >= 0).any()
    assert (batch.vision_index[video] >= 0).all()
    first = batch.pixel_values[:16].unflatten(1, (3, 2, 256))  # two pairs of frames: 0 and 1, 2 and 2
    assert not torch.equal(first[:8, :, 0], first[:8, :, 1]) and torch.equal(first[8:, :, 0], first[8:, :, 1])
    again = next(iter(loader(f"{BASIC}.dataset=data/b.json", f"{BASIC}.cache_dir=cache")))  # from the cache
    assert torch.equal(again.pixel_values, batch.pixel_values) and torch.equal(again.input_ids, batch.input_ids)


def test_other_images_of_the_same_size_are_other_data(place):
    """Their tokens are the same, so a resume would go on without a word."""
    for i in "xy":
        Image.effect_noise((40, 48), 90).save(place / f"data/{i}.png")
    ask = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A"}]
    film = [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "A"}]

    def made(names, frames=("0.png", "1.png")):
        records = [{"image": f"{name}.png", "messages": ask} for name in names]
        records += [{"videos": [[f"v/{frame}" for frame in frames]], "messages": film}]
        Path("data/i.json").write_text(json.dumps(records))
        batches = loader(f"{BASIC}.dataset=data/i.json")
        return batches.fingerprint, batches.normalization

    before, swapped, other_frames = made("xy"), made("yx"), made("xy", ("1.png", "0.png"))
    assert before == made("xy") and before[0] == swapped[0] == other_frames[0]
    assert differences(before[1], swapped[1])[0].startswith("image.files: ")
    assert differences(before[1], other_frames[1])[0].startswith("video.files: ")
    (place / "data").rename(place / "moved")
    moved = loader(f"{BASIC}.dataset=moved/i.json", f"{BASIC}.dataset_dir=moved")
    assert (moved.fingerprint, moved.normalization) == before


def test_video_with_other_timestamps_is_an_error(place, monkeypatch):
    """As many frames of the same size, but the tokens in the cache say when each was."""
    frames = np.stack([np.full((64, 64, 3), i, np.uint8) for i in range(4)])
    turns = [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "A"}]
    (place / "data/b.json").write_text(json.dumps([{"messages": turns, "video": "film.mp4"}]))
    for rate, fits in ((2, True), (2, True), (1, False)):
        write_video(place / "data/film.mp4", frames, Fraction(rate), monkeypatch)
        dataset = loader(f"{BASIC}.dataset=data/b.json", f"{BASIC}.cache_dir=cache").dataset
        if fits:
            assert "<1.2 seconds>" in dataset.preparation.tokenizer.decode(dataset[0].input_ids.tolist())
    with pytest.raises(RecordError, match=r"film\.mp4: has changed since it was measured; empty cache_dir"):
        dataset[0]


def test_show_prints_videos(place):
    out = run(place, *SHOW, f"{BASIC}.dataset=data/b.json", "--samples", "1").out
    assert "1 image, 1 video\n" in out
    frames = "".join(f"<{t} seconds><|vision_start|><|video_pad|>*2<|vision_end|>" for t in ("0.2", "1.0"))
    assert f"user\n{frames}<|vision_start|><|image_pad|>*1<|vision_end|><|im_end|>" in out
    assert "[[A film.<|im_end|>" in out


def test_weights_set_what_an_epoch_holds(place):
    files = "[{file: data/a.json, weight: 0.5}, {file: data/b.json, weight: 3}]"
    batches = loader(f"{BASIC}.dataset={files}")
    dataset, seen = batches.dataset, Counter()
    assert dataset.sizes == [12, 2]
    for epoch in (0, 1):
        numbers = [number for content in batches.packed_sequences.epoch(epoch) for number in content]
        seen.update(numbers)
        assert Counter(numbers)[12] == Counter(numbers)[13] == 3 and len(numbers) == 6 + 6
    assert all(seen[number] == 1 for number in range(12))
    numbers = batches.packed_sequences.epoch(0)
    tokens = sum(int(dataset.lengths[content].sum()) for content in numbers)
    trained = sum(int(dataset.label_tokens[content].sum()) for content in numbers)
    assert (
        f"an epoch is {tokens:,} tokens ({trained / tokens:.1%} trained) in {len(numbers)} packed sequences"
        in batches.report()
    )
    told = f" real tokens)\ndata: by weight an epoch is {6 + 6} samples: 6 of data/a.json, 6 of data/b.json"
    assert batches.report().endswith(told)
    plain = loader(f"{BASIC}.dataset=data/a.json,data/b.json")
    assert batches.fingerprint != plain.fingerprint and "weight" not in plain.report()
    one = loader(f"{BASIC}.dataset=data/b.json", f"{BASIC}.max_samples=1")
    assert one.report().startswith("data: 1 sample of 1 file, ") and " in 1 packed sequence of 160 (" in one.report()


def test_weights_that_leave_no_sample_are_an_error(place):
    with pytest.raises(SettingError, match=r"data/b\.json: the weights leave no sample for an epoch; raise one"):
        loader(f"{BASIC}.dataset=[{{file: data/b.json, weight: 0.1}}]")
