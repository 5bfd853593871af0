"""The weights' folder has a tokenizer or a template, and the recipe uses another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizer_fixture import make_model_folder

from qwen35.config.load import from_flat
from qwen35.data.other_tokenizers import other_tokenizers
from qwen35.errors import SettingError


@pytest.fixture
def place(tmp_path) -> Path:
    for name in ("model", "weights"):
        make_model_folder(tmp_path / name)
    return tmp_path


def found(place: Path, **flat: str) -> list[str]:
    base = {
        "data.dataset_param.basic_parameters.dataset": "a.json",
        "model.model_name_or_path": str(place / "model"),
        "training.train_iters": 1,
        "training.save": "unused",
    }
    return other_tokenizers(from_flat(base | flat), place / "weights")


def change(folder: Path, act: Callable[[dict], object]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    act(content)
    path.write_text(json.dumps(content))


def swap(content: dict) -> None:
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]


def test_other_ids_are_refused(place):
    change(place / "weights", swap)
    with pytest.raises(
        SettingError, match=r"weights/tokenizer.json: gives 2 tokens other ids than .*: 'A' is 33 and not 32"
    ):
        found(place)
    named = {"data.dataset_param.preprocess_parameters.model_name_or_path": str(place / "weights")}
    with pytest.raises(SettingError, match=r"model/tokenizer.json: gives 2 tokens other ids"):  # the config's own
        found(place, **named)
    (place / "weights/tokenizer.json").unlink()
    assert found(place) == []


def test_other_tokens_and_merges_are_told(place):
    added = {"id": 500, "content": "<|box|>", "special": True}
    change(place / "weights", lambda content: content["added_tokens"].append(added))
    (line,) = found(place)
    assert line.startswith(
        f"{place}/weights/tokenizer.json: not read: has 1 token that {place}/model/tokenizer.json lacks"
    )
    assert "'<|box|>'" in line
    make_model_folder(place / "weights")
    change(place / "weights", lambda content: content["model"]["merges"].reverse())
    (line,) = found(place)
    assert "merges differ" in line


def test_the_same_tokenizer_in_another_form_is_the_same(place):
    def in_words(content: dict) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    assert found(place) == []
    change(place / "weights", in_words)
    change(place / "model", lambda content: content["added_tokens"].pop())  # as if it were extended later
    change(place / "weights", lambda content: content["added_tokens"].pop())
    assert found(place) == []


def test_another_template_is_told(place):
    make_model_folder(place / "weights", thinks=False)
    (line,) = found(place)
    assert line.startswith(
        f"{place}/weights/chat_template.jinja: not read: differs from {place}/model/chat_template.jinja"
    )
    assert found(place, **{"data.dataset_param.basic_parameters.template": "qwen3_vl_nothink"}) == []


def test_a_folder_whose_templates_contradict_each_other_stops_nothing_that_does_not_use_it(place):
    (place / "weights/chat_template.json").write_text('{"chat_template": "another"}')
    (line,) = found(place)
    assert line.startswith(f"not read: {place}/weights: chat_template.json and chat_template.jinja hold different")
    assert line.endswith(f"records are rendered by {place}/model/chat_template.jinja")
