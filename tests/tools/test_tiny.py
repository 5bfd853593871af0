"""The tiny recipe's model and images: complete, reproducible, and readable by transformers."""

import json
import shutil
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from qwen35.config.load import load_settings
from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.formats import read_records
from qwen35.data.image_processor import ImageProcessor
from qwen35.data.media import ImageFolder
from qwen35.data.preparation import Preparation
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VideoProcessor
from qwen35.tools import tiny

ROOT = Path(__file__).parents[2]
TEXTS = (
    "<|im_start|>user\nWhich digit is this?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n7<|im_end|>\n",
    "naïve Żółw 1234 हिन्दी 描述  \r\n\n it's <tool_call> <|vision_start|><|image_pad|> <tts_pad>",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with model/ and digits/."""
    folder = tmp_path_factory.mktemp("tiny")
    assert tiny.make_model(folder / "model")
    assert tiny.make_digits(folder / "digits")
    return folder


@pytest.fixture(scope="module")
def preparation(made) -> Preparation:
    basic = BasicParameters(dataset=str(made / "digits/heldout.json"), dataset_dir=str(made / "digits"))
    images = ImageProcessor.from_folder(made / "model", 1024, 262144)
    videos = VideoProcessor.from_folder(made / "model", PreprocessParameters())
    return Preparation(ChatTokenizer(made / "model"), images, basic, Attr(), videos)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_runs_write_the_same_bytes(made, tmp_path):
    tiny.make_model(tmp_path / "model")
    tiny.make_digits(tmp_path / "digits")
    assert contents(tmp_path) == contents(made)
    tiny.make_model(tmp_path / "other", seed=1)
    changed = {n for n, c in contents(tmp_path / "other").items() if c != contents(made / "model")[n]}
    assert changed == {"model.safetensors"}


def test_complete_folders_are_kept_and_damaged_ones_made_anew(made, tmp_path):
    model, digits = (shutil.copytree(made / name, tmp_path / name) for name in ("model", "digits"))
    assert (tiny.make_model(model), tiny.make_digits(digits)) == (False, False)
    (model / "config.json").write_text("{}")
    (digits / "images/0007.png").unlink()
    assert (tiny.make_model(model), tiny.make_digits(digits)) == (True, True)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (digits / "train.json").unlink()
    assert (tiny.make_model(model), tiny.make_digits(digits)) == (True, True)
    assert contents(tmp_path) == contents(made)
    assert (tiny.make_model(model, force=True), tiny.make_digits(digits, force=True)) == (True, True)


def test_other_files_are_not_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.MODEL_DIR.mkdir(parents=True)
    (tiny.MODEL_DIR / "config.json").write_text("mine")
    assert tiny.main([]) == 1
    assert "was not written by this program" in capsys.readouterr().err
    assert (tiny.MODEL_DIR / "config.json").read_text() == "mine"


def test_digits_are_those_of_the_source(made):
    digits = made / "digits"
    train, heldout = (json.loads((digits / f"{name}.json").read_text()) for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (1437, 360)
    assert {r["image"] for r in train + heldout} == {f"images/{p.name}" for p in (digits / "images").iterdir()}
    answer = {int(r["id"]): int(r["conversations"][1]["value"]) for r in train + heldout}
    assert [answer[i] for i in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    below_5 = json.loads((digits / "train_0-4.json").read_text())
    assert below_5 == [r for r in train if answer[int(r["id"])] < 5] and len(below_5) == 719
    # the source's counts by digit
    counts = [len(list(g)) for _, g in groupby(sorted(answer.values()))]
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert {answer[i] for i in range(0, 1797, 5)} == set(range(10))
    pixels = np.stack([np.asarray(Image.open(digits / f"images/{i:04}.png")) for i in range(1797)]) / 15  # [1797, 8, 8]
    assert pixels.sum() == 561718  # all ink in the source
    assert pixels[0].tolist()[1] == [0, 0, 13, 15, 10, 15, 5, 0]
    text = (digits / "README.md").read_text()
    assert "10.24432/C50P49" in text and "CC BY 4.0" in text


def test_control_tokens_have_the_published_names_and_order(made):
    published = json.loads((ROOT / "tests/fixtures/templates/special_tokens.json").read_text())["added_tokens"]
    ours = json.loads((made / "model/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert list(ours.values()) == [{**entry, **t} for entry, t in zip(ours.values(), published.values(), strict=True)]
    assert len(ours) == 33
    first = min(map(int, ours))
    assert sorted(map(int, ours)) == list(range(first, first + 33))
    tokenizer = Tokenizer.from_file(str(made / "model/tokenizer.json"))
    assert tokenizer.get_vocab_size(with_added_tokens=False) == first
    assert all(tokenizer.token_to_id(entry["content"]) == int(i) for i, entry in ours.items())
    config = json.loads((made / "model/config.json").read_text())
    assert config["text_config"]["vocab_size"] > tokenizer.get_vocab_size()
    ends = json.loads((made / "model/generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]


def test_config_has_the_published_fields(made):
    def keys(config: dict, prefix: str = "") -> set[str]:
        below = [keys(v, f"{prefix}{k}.") for k, v in config.items() if isinstance(v, dict)]
        return {prefix + k for k in config}.union(*below)

    published = json.loads((ROOT / "assets/configs/35B-A3B.json").read_text())
    assert keys(json.loads((made / "model/config.json").read_text())) == keys(published)


def test_transformers_loads_the_model(made):
    from transformers import AutoConfig, AutoModelForImageTextToText

    assert AutoConfig.from_pretrained(made / "model").model_type == "qwen3_5_moe"
    _, info = AutoModelForImageTextToText.from_pretrained(made / "model", output_loading_info=True)
    assert not any(info.values()), info


def test_transformers_reads_the_same_tokens(made):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(made / "model")
    ours = Tokenizer.from_file(str(made / "model/tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text)["input_ids"] == ids
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert theirs.decode(ids) == text
    assert len(theirs) == ours.get_vocab_size()
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"


def test_transformers_makes_the_same_prompt_and_pixels(made, preparation):
    from transformers import AutoImageProcessor, AutoTokenizer

    folder = made / "model"
    records = read_records(made / "digits/heldout.json", Attr(), ImageFolder(made / "digits"))
    record = next(records)
    ours = prompt_batch(record, preparation, vision_spec(folder), thinking=False)
    content = [{"type": "image"}, {"type": "text", "text": record.turns[0].text}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer(text)["input_ids"] == ours.input_ids.tolist()  # an image of this size is one token
    pixels = AutoImageProcessor.from_pretrained(folder)(images=[Image.open(record.images[0])], return_tensors="pt")
    assert torch.equal(pixels["image_grid_thw"], ours.grid_thw)
    assert torch.equal(pixels["pixel_values"], ours.pixel_values)


def test_recipe_packs_without_padding(made, preparation):
    basic = load_settings(ROOT / "configs/tiny.yaml").data.dataset_param.basic_parameters
    records = read_records(made / "digits/train.json", Attr(), ImageFolder(made / "digits"))
    lengths = {len(sample.ids) for record in records for _, sample in preparation.tokenise(record)}
    assert len(lengths) == 1 and basic.cutoff_len % lengths.pop() == 0


def test_pairs_are_the_records_with_a_wrong_digit_beside_the_right_one(made):
    for name, of in (("pairs.json", "train.json"), ("heldout_pairs.json", "heldout.json")):
        pairs, records = (json.loads((made / "digits" / file).read_text()) for file in (name, of))
        for pair, record in zip(pairs, records, strict=True):
            question, right = record["conversations"]
            assert pair["conversations"] == [question] and pair["chosen"] == right and pair["image"] == record["image"]
            assert pair["rejected"]["value"] in set("0123456789") - {right["value"]}
        assert {pair["rejected"]["value"] for pair in pairs} == set("0123456789")
