"""Random broken records, files and images: an error or a skip, no crash, no wrong loss mask."""

import copy
import io
import json
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optional import HAS_AV, stand_in_for_av
from PIL import Image
from tokenizer_fixture import make_model_folder

from qwen35.batch import IGNORE
from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data.collator import vision_spec
from qwen35.data.data_warnings import Skipped
from qwen35.data.dataset import Dataset
from qwen35.data.image_processor import ImageError, ImageProcessor
from qwen35.data.preparation import Preparation
from qwen35.data.record import RecordError
from qwen35.data.tokenized import make_samples, tokenised
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VideoProcessor

quick = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, an image, a truncated image, a video of three frames."""
    place = tmp_path_factory.mktemp("fuzz")
    make_model_folder(place / "hf")
    (place / "v").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    for name in ("a.png", "v/1.png", "v/2.png", "v/3.png"):
        Image.fromarray(pixels).save(place / name)
    (place / "cut.png").write_bytes((place / "a.png").read_bytes()[:900])
    return place


@pytest.fixture(scope="module", autouse=True)
def pyav():
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_AV:
            patch.setitem(sys.modules, "av", stand_in_for_av())
        yield


@pytest.fixture(scope="module")
def preparation(place):
    limits = PreprocessParameters(image_max_pixels=4096, video_max_pixels=2048)
    basic = BasicParameters(
        "x", dataset_dir=str(place), cache_dir=str(place / "cache"), on_bad_record="skip", cutoff_len=5000
    )
    images = ImageProcessor.from_folder(place / "hf", 1024, 4096)
    return Preparation(
        ChatTokenizer(place / "hf"), images, basic, Attr(), VideoProcessor.from_folder(place / "hf", limits)
    )


def png():
    out = io.BytesIO()
    Image.new("RGB", (33, 20), (1, 2, 3)).save(out, "PNG")
    return out.getvalue()


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
WHOLE = [
    {
        "id": 1,
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}],
    },
    {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<think>t</think>A"}]},
    {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": "A", "reasoning_content": "t"},
            {"role": "user", "content": [{"type": "video", "video": ["v/1.png", "v/2.png"], "sample_fps": 2}]},
            {"role": "assistant", "content": "B"},
        ]
    },
    {
        "tools": [{"name": "f"}],
        "videos": ["v"],
        "messages": [
            {"role": "user", "content": "<video>Q"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "A"},
        ],
    },
]
ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "<image>", "<video>", "<|im_end|>", "</think>", "data:image/png;base64,AA=="]),
    st.sampled_from(["a.png", "cut.png", "../a.png", "no.png", "v", "."]),
    st.sampled_from(["user", "assistant", "tool", "system", "human", "gpt", "function_call", "text", "image"]),
    st.sampled_from([[], {}, [[]], [{}], {"bytes": None}, ["v/1.png"], [None, 1]]),
)


def places(value, path=()):
    """The paths to all values inside."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inside:
        yield from places(below, (*path, key))


@st.composite
def broken_records(draw):
    record = copy.deepcopy(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(places(record))))
        if not path:
            continue
        holder = record
        for key in path[:-1]:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "remove", "repeat", "rename"]))
        if what == "replace":
            holder[path[-1]] = copy.deepcopy(draw(ANY))
        elif what == "remove":
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
        else:
            holder[draw(st.sampled_from(["images", "image", "text", "content", "value", "role", "type", "x"]))] = (
                copy.deepcopy(draw(ANY))
            )
    return record


def check_sample(record, sample, preparation):
    """Checks the loss mask against the text: only answers are trained, up to their end."""
    tokenizer, ids, trained = preparation.tokenizer, sample.ids.tolist(), sample.loss_mask.tolist()
    pads = {tokenizer.image_id, tokenizer.video_id}
    assert sum(token in pads for token in ids) == sum(preparation.images.tokens(grid) for grid in sample.grids)
    assert not any(mask for token, mask in zip(ids, trained, strict=True) if token in pads)
    assert len(sample.grids) == len(record.images) + len(record.videos)
    starts = [i for i, token in enumerate(ids) if tokenizer.decode([token]) == "<|im_start|>"]
    texts = [tokenizer.decode(ids[a:b]) for a, b in pairwise([*starts, len(ids)])]
    answers = [turn for turn in record.turns if turn.role == "assistant"]
    assert sum(text.startswith("<|im_start|>assistant\n") for text in texts) == len(answers)
    asked = iter(answers)
    for (a, b), text in zip(pairwise([*starts, len(ids)]), texts, strict=True):
        is_trained = text.startswith("<|im_start|>assistant\n") and next(asked).loss is not False
        assert any(trained[a:b]) == is_trained
        if is_trained:
            first = trained[a:b].index(True)
            assert all(trained[a + first : b]) and tokenizer.decode(ids[a + first : b]).endswith("<|im_end|>\n")


@settings(quick, max_examples=120)
@given(records=st.lists(broken_records(), min_size=1, max_size=4), lines=st.booleans())
def test_records(records, lines, place, preparation):
    file = place / "r.json"
    file.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    skipped, made, parts_made = Skipped(), [], 0
    for record, parts in tokenised(file, preparation, skip=skipped.add):
        for part in parts:
            check_sample(*part, preparation)
        made.append(record)
        parts_made += len(parts)
    assert len(made) + len(skipped) == len(records)
    if len(skipped):
        assert str(file) in skipped.first and "record " in skipped.first and "\n" not in skipped.first
        with pytest.raises(RecordError) as caught:  # the same one stops where none is to be skipped
            list(tokenised(file, preparation))
        below = f", dataset_dir is {preparation.basic.dataset_dir}" if "missing" in caught.value.kind else ""
        assert str(caught.value) == f"{skipped.first}{below}; on_bad_record: skip leaves such records out"
    samples = make_samples(file, preparation, None)
    assert (len(samples.sources), samples.records) == (parts_made, len(records))
    if not made:
        return
    basic = replace(preparation.basic, dataset=str(file), cache_dir=None)
    if any("base64" in json.dumps(record) for record in records):
        basic = replace(basic, cache_dir=preparation.basic.cache_dir)
    dataset = Dataset(replace(preparation, basic=basic), vision_spec(place / "hf"))
    broken: list[str] = []
    for i in range(len(dataset)):
        try:
            sample = dataset[i]  # decoded
        except RecordError as error:
            broken.append(str(error))
            continue
        assert (
            len(sample.pixel_values) == int(sample.grid_thw.prod(-1).sum())
            and torch.isfinite(sample.pixel_values).all()
        )
        assert (sample.labels != IGNORE).any()
    assert all("cut.png" in message or "pixels, others" in message for message in broken)


@settings(quick, max_examples=80)
@given(
    which=st.integers(0, 3),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), max_size=4),
    lines=st.booleans(),
)
def test_files(which, damage, lines, place, preparation):
    data = (json.dumps(WHOLE[which]) + "\n").encode() * 3 if lines else json.dumps([WHOLE[which]] * 3).encode()
    for at, new in damage:
        at %= len(data)
        data = data[:at] + new + data[at + 1 :]
    file = place / "f.json"
    file.write_bytes(data)
    skipped = Skipped()
    whole = None
    try:
        for _, parts in tokenised(file, preparation, skip=skipped.add):
            for part in parts:
                check_sample(*part, preparation)
    except RecordError as error:
        whole = str(error)
    assert whole is None or (str(file) in whole and "\n" not in whole)


FORMATS = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]
MODES = ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16", "F", "I"]


@settings(quick, max_examples=150)
@given(
    kind=st.sampled_from(FORMATS),
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 10**6),
)
def test_images(kind, mode, size, damage, cut, place, preparation):
    image = Image.effect_noise(size, 90)
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    out = io.BytesIO()
    try:
        image.save(out, kind)
    except (OSError, ValueError):  # a format without this mode
        image.convert("RGB").save(out, kind)
    data = bytearray(out.getvalue())
    for at, new in damage:
        data[at % len(data)] = new
    path = place / "image"
    path.write_bytes(data[: len(data) if cut % 2 else cut % len(data)])
    grids, refused = [], []
    for use in (preparation.images.grid, lambda path: preparation.images.patches(path)[1]):
        try:
            grids.append(use(path))
        except ImageError as error:
            refused.append(str(error))
    assert not any("\n" in message for message in refused)
    assert len(set(grids)) <= 1  # what is measured is what is decoded
    if cut % 2 and not damage:
        assert len(grids) == 2
