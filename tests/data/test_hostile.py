"""Hostile or damaged records, images and caches: nothing is read or trained that must not be."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizer_fixture import make_model_folder

from qwen35.config.load import from_flat, to_yaml
from qwen35.data import MicroBatches, RecordError, template
from qwen35.data import tokenized as module
from qwen35.data.__main__ import main
from qwen35.data.background import MIN_SHARED_MEMORY, shared
from qwen35.data.preparation import LONGEST_TEXT, Preparation
from qwen35.data.record import Record, Turn
from qwen35.data.samples import TENSORS
from qwen35.data.style import Style
from qwen35.data.template import training_pieces
from qwen35.data.tokenized import load_samples, make_samples
from qwen35.errors import SettingError

BASIC = "data.dataset_param.basic_parameters"
SHM_FULL = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


def turns(asked, answer="Yes."):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


@pytest.fixture
def home(tmp_path):
    """A folder of records, images and a video, beside one that must not be read."""
    data, secret = tmp_path / "data", tmp_path / "secret"
    (data / "pics").mkdir(parents=True)
    secret.mkdir()
    for folder in (data / "pics", secret):
        for i in range(4):
            Image.fromarray(np.full((64, 64, 3), 10 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    frames = [[f"pics/{i}.png" for i in (1, 2, 3)]]
    records = [
        {"id": 0, "messages": turns("Hi")},
        {"id": 1, "image": "pics/0.png", "messages": turns("<image> What?")},
        {"id": 2, "videos": frames, "messages": turns("<video> What?")},
    ]
    (data / "a.json").write_text(json.dumps(records))
    return data


def settings(home, model, **flat):
    base = {
        "model.model_name_or_path": str(model),
        f"{BASIC}.dataset": f"{home}/a.json",
        f"{BASIC}.dataset_dir": str(home),
        f"{BASIC}.cutoff_len": 2048,
        f"{BASIC}.cache_dir": str(home / "cache"),
        "data.dataset_param.preprocess_parameters.image_max_pixels": 8192,
        "data.dataloader_param.num_workers": 0,
        "data.dataloader_param.patch_bucket": 64,
        "training.train_iters": 4,
        "training.save": "unused",
    }
    return from_flat(base | flat)


def replaced_by_link(path, target):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["pics/0.png", "pics/2.png", "pics"])
def test_an_image_replaced_by_a_link_is_not_followed(home, model, name):
    """The tokens are cached, so only the pixels are read again."""
    s = settings(home, model)
    next(iter(MicroBatches(s, 0, 1)))
    replaced_by_link(home / name, home.parent / "secret" / name.removeprefix("pics").removeprefix("/"))
    with pytest.raises(RecordError, match=r"record [23] \(id [12]\): .*has become a link, or a folder above it has"):
        next(iter(MicroBatches(s, 0, 1)))


def test_links_below_the_folder_stay_usable(home, model):
    """dataset_dir may be a link, and an image may be a link inside it."""
    (home / "pics/0.png").rename(home / "pics/real.png")
    (home / "pics/0.png").symlink_to("real.png")
    (home.parent / "link").symlink_to(home)
    s = settings(home.parent / "link", model)
    for _ in range(2):
        next(iter(MicroBatches(s, 0, 1)))


@pytest.mark.parametrize("seed", range(4))
def test_cached_tokens_with_a_flipped_bit_are_rebuilt(home, model, seed):
    preparation = Preparation.of(settings(home, model))
    right = make_samples(home / "a.json", preparation, None)
    load_samples(home / "a.json", preparation, None)
    (entry,) = (path for path in (home / "cache").iterdir() if path.is_file())
    whole = entry.read_bytes()
    chance = np.random.default_rng(seed)
    for place in chance.integers(0, len(whole), 40).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(chance.integers(0, 8))
        entry.write_bytes(flipped)
        found = load_samples(home / "a.json", preparation, None)
        for name in TENSORS:
            assert torch.equal(getattr(found, name), getattr(right, name)), (place, name)
        assert found.records == right.records
        assert entry.read_bytes() == whole


def test_intact_cached_tokens_are_not_rebuilt(home, model, monkeypatch):
    preparation = Preparation.of(settings(home, model))
    load_samples(home / "a.json", preparation, None)
    monkeypatch.setattr(module, "_make_shared", None)  # any use would fail
    assert len(load_samples(home / "a.json", preparation, None).sources) == 3


def test_a_text_too_long_to_tokenise_is_refused(home, model):
    large = {"id": 7, "messages": turns("Hi", "x " * (LONGEST_TEXT // 2 + 1))}
    (home / "a.json").write_text(json.dumps([large, {"id": 8, "messages": turns("Hi")}]))
    with pytest.raises(
        RecordError, match=r"record 1 \(id 7\): 4,194,\d+ characters of text, more than 4,194,304; cut it"
    ):
        make_samples(home / "a.json", Preparation.of(settings(home, model)), None)
    skipping = Preparation.of(settings(home, model, **{f"{BASIC}.on_bad_record": "skip"}))
    assert make_samples(home / "a.json", skipping, None).skipped.kinds == {"text too long": 1}


@pytest.mark.parametrize("roles", [("user", "assistant"), ("assistant", "tool")], ids=str)
def test_a_long_conversation_takes_linear_time(monkeypatch, roles):
    looks = 0
    is_query = template.is_query

    def counted(turn):
        nonlocal looks
        looks += 1
        return is_query(turn)

    monkeypatch.setattr(template, "is_query", counted)
    talk = [Turn(role, "x") for _ in range(8000) for role in roles]  # type: ignore[arg-type]
    pieces = training_pieces(Record("x", (Turn("user", "x"), *talk, Turn("assistant", "x"))), Style())
    assert looks <= 3 * 16_002
    assert sum(piece.text == "assistant\n" for piece in pieces) == 8001


def test_a_full_dev_shm_is_named(monkeypatch):
    """By the system's own refusal of a petabyte."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda _: torch.UntypedStorage._new_shared(1 << 50))
    with pytest.raises(SettingError, match=r"^/dev/shm has no room for 8 bytes of a batch \(.*\); .*--shm-size"):
        shared(torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("room", [0, MIN_SHARED_MEMORY])
def test_a_full_dev_shm_ends_a_run_in_one_line(home, model, monkeypatch, room):
    """It may be found before a worker is started, or in a worker."""
    move = torch.Tensor.share_memory_

    def full(tensor):
        if tensor.nbytes == room:
            return move(tensor)
        raise RuntimeError(SHM_FULL)

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    batches = MicroBatches(settings(home, model, **{"data.dataloader_param.num_workers": 1}), 0, 1)
    with pytest.raises(SettingError, match=r"^/dev/shm has no room for .*set data\.dataloader_param\.num_workers: 0$"):
        next(iter(batches))


def test_half_a_surrogate_and_bidirectional_text_in_an_id(home, model, capsys, tmp_path):
    text = json.dumps([{"id": "a\ud83d\u202egpj\x1b[2J", "messages": turns("Hi")}, {"id": "\ud83d", "messages": []}])
    (home / "a.json").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(settings(home, model)))
    assert main(["show", str(recipe), "--samples", "2"]) == 1
    out, err = capsys.readouterr()
    assert r"record 1 (id a\ud83d\u202egpj\x1b[2J)" in out and r"record 2 (id \ud83d)" in err
    assert (out + err).replace("\n", "").isprintable()


def test_pipes_instead_of_images_or_records_are_refused(home, model):
    (home / "pics/0.png").unlink()
    os.mkfifo(home / "pics/0.png")
    with pytest.raises(RecordError, match=r"image 1 of 1, .*/0\.png: is not a file"):
        MicroBatches(settings(home, model), 0, 1)
    (home / "a.json").unlink()
    os.mkfifo(home / "a.json")
    with pytest.raises(SettingError, match=r"a\.json: is a pipe or a device"):
        MicroBatches(settings(home, model), 0, 1)
    assert Path(home / "a.json").is_fifo()
