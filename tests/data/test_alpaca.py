"""Alpaca's fields and turns of any tags, by the format and attr of a dataset entry or of all."""

import json

import pytest
from mistakes import BASIC, SHOW, place, run, whole

from qwen35.config.load import load_settings, to_yaml
from qwen35.config.schema import Attr
from qwen35.data import MicroBatches
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.formats import read_records
from qwen35.data.media import ImageFolder
from qwen35.data.record import RecordError, Turn
from qwen35.errors import SettingError

__all__ = ["place", "whole"]  # fixtures

ALPACA = {"instruction": "Add them.", "input": "1 and 2", "output": "3"}
TURNS = (Turn("user", "Add them.\n1 and 2"), Turn("assistant", "3"))


def read(folder, *records, attr=Attr(format="alpaca"), **options):  # noqa: B008
    (folder / "x.json").write_text(json.dumps(records))
    return list(read_records(folder / "x.json", attr, ImageFolder(folder), **options))


def test_fields_of_alpaca(tmp_path):
    warnings = DataWarnings()
    plain = {"instruction": "Hi", "input": "", "output": "Yo"}
    more = {"id": 7, "system": "Be brief.", "history": [["A", "B"], ["C", "D"]], "source": "me"}
    one, two, three, four = read(
        tmp_path, ALPACA, plain, plain | more, {"input": "Hi", "output": ""}, warnings=warnings
    )
    assert one.turns == TURNS
    assert two.turns == (Turn("user", "Hi"), Turn("assistant", "Yo"))
    roles = [("system", "Be brief."), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")]
    assert three.turns == (*[Turn(*turn) for turn in roles], *two.turns)
    assert three.source == f"{tmp_path}/x.json, record 3 (id 7)"
    assert four.turns == (Turn("user", "Hi"), Turn("assistant", ""))
    assert warnings.lines() == [f"1 answer is empty; first: {tmp_path}/x.json, record 4"]
    (asked,) = read(tmp_path, {"instruction": "Hi"}, answered=False)
    assert asked.turns == (Turn("user", "Hi"),)


def test_alpaca_with_images_masks_tools_and_boxes(tmp_path):
    from PIL import Image

    Image.new("L", (50, 50)).save(tmp_path / "a.png")
    record = {"instruction": "<image>Where is <ref-object>?", "output": "<bbox>", "images": ["a.png"]}
    record |= {"objects": {"ref": ["it"], "bbox": [[5, 10]]}, "tools": '[{"name": "f"}]', "loss_mask": [0, 1]}
    (r,) = read(tmp_path, record, attr=Attr(format="alpaca", bbox_format="new"))
    assert r.turns == (
        Turn("user", (tmp_path / "a.png", "Where is it?"), loss=False),
        Turn("assistant", "[100, 200]", loss=True),
    )
    assert r.tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    ("named", "more", "count"),
    [
        ({"prompt": "instruction", "response": "output"}, {}, 1),
        ({"prompt": "instruction", "query": "input"}, {}, 0),
        ({"prompt": "instruction", "query": "input"}, {"history": [["A", "B"]]}, 1),
        ({}, {"history": [["A", "B"]]}, 0),
    ],
)
def test_columns_that_attr_does_not_name_are_told(tmp_path, named, more, count):
    """Of a dataset_info.json LLaMA-Factory reads the named columns alone, if it names any."""
    warnings = DataWarnings()
    plain = {"instruction": "Hi", "input": "", "output": "Yo"}
    read(tmp_path, ALPACA | more, plain, attr=Attr(format="alpaca", **named), warnings=warnings)
    told = [line.partition(" although")[0] for line in warnings.lines()]
    assert told == ["1 record has input or history, read"] * count


def test_columns_may_have_other_names(tmp_path):
    attr = Attr(format="alpaca", prompt="q.text", query="context", response="a", history="before", system="s")
    record = {
        "q": {"text": "Q", "lang": "en"},
        "context": "C",
        "a": "A",
        "before": [["B", "b"]],
        "s": "S",
        "instruction": "?",
    }
    warnings = DataWarnings()
    (r,) = read(tmp_path, record, attr=attr, warnings=warnings)
    assert [turn.content for turn in r.turns] == ["S", "B", "b", "Q\nC", "A"]
    assert warnings.lines() == [f"fields that are not read: instruction (1 time, first: {tmp_path}/x.json, record 1)"]


WRONG = {
    "no question": ({"output": "A", "text": "x"}, r": has no question in instruction; it has 'output', 'text'$"),
    "no answer": ({"instruction": "Q", "text": "x"}, r": has no field output with the answer; it has 'instruction', 'text'$"),
    "question": ({"instruction": 3, "output": "A"}, r", instruction: is a number, not text$"),
    "more": ({"instruction": "Q", "input": ["x"], "output": "A"}, r", input: is a list, not text$"),
    "answer": ({"instruction": "Q", "output": ["A", "B"]}, r", output: is a list, not text$"),
    "history": (ALPACA | {"history": "x"}, r", history: is text, not a list of \[question, answer\] pairs$"),
    "pair": (ALPACA | {"history": [["a", "b"], ["c"]]}, r", history\[1\]: is a list, not a pair \[question, answer\]$"),
    "word": (ALPACA | {"history": [["a", 3]]}, r", history\[0\]: is a number, not text$"),
    "mask": (ALPACA | {"loss_mask": [1]}, r", instruction: has 2 turns, but the record's loss_mask has 1 entries"),
    "image": (ALPACA | {"images": ["a.png"]}, r", .*: 1 image but no <image> in the user and tool turns"),
    "pair of preference": (ALPACA | {"rejected": "4"}, r": has rejected, which is not read"),
    "turns": ({"messages": [{"role": "user", "content": "x"}]}, r": has no question in instruction; it has 'messages'$"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_records(tmp_path, name):
    record, message = WRONG[name]
    with pytest.raises(RecordError, match=r"x\.json, record 2" + message):
        read(tmp_path, ALPACA, record)


def test_alpaca_without_its_format_names_it(tmp_path):
    with pytest.raises(
        RecordError, match=r"has no field messages or conversations; .*; Alpaca's fields are read with "
    ):
        read(tmp_path, ALPACA, attr=Attr())


def test_sharegpt_in_pairs_and_with_any_tags(tmp_path):
    """ms-swift's documented ShareGPT form, and LLaMA-Factory's tags under other names."""
    pairs = [{"human": "A", "assistant": "B"}, {"human": "C", "assistant": "D"}]
    wanted = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")]
    raw = {"system": "S", "conversation": pairs}
    (r,) = read(tmp_path, raw, attr=Attr(messages="conversation"))
    assert [(turn.role, turn.content) for turn in r.turns] == wanted
    (r,) = read(tmp_path, raw | {"loss_mask": [0, 1, 0, 0]}, attr=Attr(messages="conversation"))
    assert [turn.loss for turn in r.turns] == [None, False, True, False, False]
    with pytest.raises(RecordError, match=r"conversation\[1\]: user turn where assistant is expected"):
        read(tmp_path, {"conversation": [{"human": "A"}, {"human": "B"}]}, attr=Attr(messages="conversation"))
    tags = Attr(
        messages="talk", role_tag="who", content_tag="said", user_tag="Q", assistant_tag="A", system_tag="S",
        observation_tag="O", function_tag="F",
    )  # fmt: skip
    said = [("S", "s"), ("Q", "q"), ("F", '{"name": "f", "arguments": {"x": 1}}'), ("O", "o"), ("A", "a")]
    (r,) = read(tmp_path, {"talk": [{"who": who, "said": text} for who, text in said]}, attr=tags)
    assert [turn.role for turn in r.turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert (r.turns[2].tool_calls[0].name, r.turns[2].tool_calls[0].arguments) == ("f", {"x": 1})


# -- entries of `dataset` --------------------------------------------------------------------------

TALK = {"talk": [{"who": "Q", "said": "Hello"}, {"who": "A", "said": "Hi"}]}
TAGS = "attr: {messages: talk, role_tag: who, content_tag: said, user_tag: Q, assistant_tag: A}"


@pytest.fixture
def files(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "data/alpaca.json").write_text(json.dumps([ALPACA, {"instruction": "Hi", "output": "Yo"}]))
    (place / "data/talk.json").write_text(json.dumps([TALK]))
    return place


def entries(*listed):
    return f"{BASIC}.dataset=[{', '.join(listed)}]"


ALPACA_FILE, TALK_FILE = "{file: data/alpaca.json, format: alpaca}", f"{{file: data/talk.json, {TAGS}}}"


def test_each_file_has_its_own_format(files):
    done = run(files, *SHOW, entries(TALK_FILE, ALPACA_FILE, "data/a.json"), "--samples", "4")
    assert done.code == 0, done.err
    for source, question, answer in (
        ("talk.json, record 1", "Hello", "Hi"),
        ("alpaca.json, record 1", "Add them.\n1 and 2", "3"),
        ("alpaca.json, record 2", "Hi", "Yo"),
        ("a.json, record 1 (id r0)", "What is 0?", "It is 0."),
    ):
        shown = done.out[done.out.index(f"--- data/{source}") :].split("---")[1]
        assert f"user\n{question}<|im_end|>" in shown and f"\n\n[[{answer}<|im_end|>" in shown
    lengths = run(files, *SHOW, entries(TALK_FILE, ALPACA_FILE, "data/a.json"), "--lengths")
    assert lengths.code == 0 and "15 records, 15 samples" in lengths.out, lengths
    settings = load_settings("r.yaml", [entries(TALK_FILE, ALPACA_FILE, "data/a.json"), f"{BASIC}.cache_dir=cache"])
    again = files / "again.yaml"
    again.write_text(to_yaml(settings))
    assert load_settings(again) == settings
    made = MicroBatches(settings, 0, 1)
    assert made.dataset.sizes == [1, 2, 12]
    cached = MicroBatches(settings, 0, 1)
    assert cached.fingerprint == made.fingerprint
    for other in (
        "{file: data/alpaca.json}",
        "{file: data/talk.json, format: alpaca}",
        TALK_FILE.replace("talk,", "x,"),
    ):
        with pytest.raises(RecordError, match="has no "):  # nothing of the cache is taken for it
            MicroBatches(load_settings("r.yaml", [entries(other), f"{BASIC}.cache_dir=cache"]), 0, 1)


def test_the_format_of_all_files(files):
    alpaca = ["data.dataset_param.attr.format=alpaca", f"{BASIC}.dataset=data/alpaca.json"]
    assert MicroBatches(load_settings("r.yaml", alpaca), 0, 1).samples == 2
    mixed = [alpaca[0], entries("data/alpaca.json", "{file: data/a.json, format: sharegpt}")]
    assert MicroBatches(load_settings("r.yaml", mixed), 0, 1).samples == 14


def test_names_that_no_record_has(files):
    attr = "data.dataset_param.attr"
    own = "{file: data/alpaca.json, format: alpaca, attr: {query: nope}}"
    talk = TALK_FILE.replace("{messages", "{images: nope, messages")
    for listed, setting in (
        ([own, "data/a.json"], rf"{BASIC}.dataset\[0\].attr.query"),
        (["data/a.json", talk], rf"{BASIC}.dataset\[1\].attr.images"),
    ):
        with pytest.raises(
            SettingError, match=rf"^{setting}: no record of data/\w+.json has a field 'nope'; they have '"
        ):
            MicroBatches(load_settings("r.yaml", [entries(*listed)]), 0, 1)
    (files / "data/b.json").write_text(json.dumps([{"q": "Q", "output": "A"}]))
    shared = [entries(ALPACA_FILE, "{file: data/b.json, format: alpaca}", "data/a.json"), f"{attr}.prompt=q"]
    assert MicroBatches(load_settings("r.yaml", shared), 0, 1).samples == 15
    shared[1] = f"{attr}.prompt=nope"
    with pytest.raises(SettingError, match=rf"^{attr}.prompt: no record of data/alpaca.json,.* has a field 'nope'"):
        MicroBatches(load_settings("r.yaml", [entries(ALPACA_FILE, "data/a.json"), shared[1]]), 0, 1)


@pytest.mark.parametrize(
    ("listed", "more", "message"),
    [
        ("{file: a, format: parquet}", [], r"dataset\[0\]\.format: 'parquet' is not one of 'sharegpt' or 'alpaca'"),
        ("{file: a, formatting: alpaca}", [], r"dataset\[0\]\.formatting is no setting; it is .*attr\.format here"),
        ("{file: a, attr: {mesages: x}}", [], r"dataset\[0\]\.attr\.mesages; did you mean .*\[0\]\.attr\.messages\?"),
        ("{file: a, attr: x}", [], r"dataset\[0\]\.attr: 'x' is not a section"),
        ("{file: a, attr: {prompt: q}}", [], r"dataset\[0\]\.attr\.prompt is read in files of format: alpaca alone"),
        ("{file: a, format: alpaca, attr: {user_tag: q}}", [], r"\[0\]\.attr\.user_tag is read in .* sharegpt alone"),
        ("{file: a, attr: {images: q, videos: q}}", [], r"dataset\[0\]\.attr: images and videos are both 'q'"),
        (
            "{file: a, format: alpaca}",
            ["messages"],
            r"dataset_param\.attr\.messages is read in files of format: sharegpt",
        ),
        ("a", ["history"], r"dataset_param\.attr\.history is read in files of format: alpaca alone"),
    ],
)
def test_wrong_entries(files, listed, more, message):
    with pytest.raises(SettingError, match=message):
        load_settings("r.yaml", [entries(listed), *[f"data.dataset_param.attr.{name}=x" for name in more]])
