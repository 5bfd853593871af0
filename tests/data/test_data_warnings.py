"""Data warnings at the start of a run, and errors about fields named in attr."""

import json
from pathlib import Path

import numpy as np
import pytest
from mistakes import BASIC, DATA, change, place, run, whole
from PIL import Image
from tokenizer_fixture import PUBLISHED, make_tokenizer
from transformers import PreTrainedTokenizerFast

from qwen35.config.load import load_settings
from qwen35.data import MicroBatches, RecordError
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.preparation import Preparation
from qwen35.data.record import Record, Turn
from qwen35.data.validation import ValidationSet
from qwen35.errors import SettingError

__all__ = ["place", "whole"]  # fixtures

FILE, ATTR, CACHE = "data/a.json", "data.dataset_param.attr", f"{BASIC}.cache_dir=cache"
BOTH = f"{BASIC}.dataset=data/a.json,data/b.json"
JOINED = f"{BASIC}.multi_turn=joined"
TEXT = {"id": "t", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
UNREAD_VISUALS = "data: possible images or videos that are not read, in records that have none: "


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def write(name: str, *records: dict) -> None:
    with open(name, "w") as file:  # noqa: PTH123
        json.dump(records, file)


def loader(*overrides: str) -> MicroBatches:
    return MicroBatches(load_settings("r.yaml", overrides), 0, 1)


def report_lines(*overrides: str) -> list[str]:
    """The lines of the report after the first."""
    return loader(*overrides).report().splitlines()[1:]


# -- images, files and fields of which only a part is used ----------------------------------------


def test_images_of_which_the_pixels_lose_something_are_counted(place):
    """The values are those of transformers, but what they leave out is told."""
    steps = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(steps.astype(np.uint16)).save("data/deep.png")
    Image.fromarray((steps / 65535).astype(np.float32)).save("data/float.tif")
    first, *others = (Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue"))
    for name in ("pages.tif", "moves.gif", "moves.webp", "moves.png"):
        first.save(f"data/{name}", save_all=True, append_images=others)
    first.save("data/one.gif")
    Image.new("RGBA", (64, 64)).save("data/clear.png")
    names = ["deep.png", "float.tif", "pages.tif", "moves.gif", "moves.webp", "moves.png", "one.gif", "clear.png"]
    asked = {"role": "user", "content": "<image>" * len(names)}
    frames = {"role": "user", "content": "<video>"}
    write(
        FILE,
        TEXT | {"messages": [asked, TEXT["messages"][1]], "images": names},
        TEXT | {"messages": [frames, TEXT["messages"][1]], "videos": [["deep.png", "deep.png"]]},
    )
    for more in ([], [CACHE], [CACHE]):
        assert report_lines(*more) == [
            (
                "data: 3 images have more than 8 bits a channel, and all above 255 is white, as in transformers; first: "
                "data/a.json, record 1 (id t)"
            ),
            (
                "data: 4 images have several frames or pages, and as in transformers only the first is used; first: "
                "data/a.json, record 1 (id t)"
            ),
        ]
    asked = {"from": "human", "value": "<image>" * len(names)}
    write(FILE, {"conversations": [asked, {"from": "gpt", "value": "y"}], "image": names})
    for more in ([], ["--tokenizer", "hf"]):
        done = run(".", *DATA, *more)
        assert "\n2 images have more than 8 bits a channel" in done.out, done.err
        assert "\n4 images have several frames or pages" in done.out


def test_frames_in_a_format_that_is_not_read_are_not_left_out(place):
    frame = Image.new("RGB", (64, 64))
    Path("data/v").mkdir()
    for name in ("1.png", "2.gif", "3.jfif", "4.png"):
        frame.save(f"data/v/{name}")
    write(FILE, TEXT | {"messages": [{"role": "user", "content": "<video>"}, TEXT["messages"][1]], "video": "v"})
    assert loader().dataset[0].grid_thw.tolist() == [[2, 4, 4]]
    Path("data/v/5.heic").write_bytes(b"x")
    with pytest.raises(RecordError, match=r"5\.heic is a frame in a format that is not read; make it JPEG or PNG"):
        loader()


def test_a_file_that_is_listed_twice_is_reported(place):
    write("data/b.json", TEXT)
    assert report_lines(f"{BASIC}.dataset=data/b.json,data/../data/b.json") == [
        "data: data/../data/b.json is listed more than once, and so are its records in each epoch"
    ]


def test_a_usual_field_beside_the_one_in_attr_is_reported(place):
    """attr says which one counts; the other one is not read, as any field that is not."""
    turns = [{"role": "user", "content": "<image>", "text": "x"}, {"role": "assistant", "content": "y"}]
    write(FILE, {"messages": turns, "images": ["1.png"], "photo": "2.png"}, {"messages": TEXT["messages"]})
    assert report_lines(f"{ATTR}.images=photo") == [
        (
            "data: fields that are not read: images (1 time, first: data/a.json, record 1), "
            "messages[].text (1 time, first: data/a.json, record 1, messages[0])"
        )
    ]
    write(FILE, {"messages": [turn | {"text": "z"} for turn in TEXT["messages"]]})
    assert report_lines(f"{ATTR}.content_tag=text") == [
        "data: fields that are not read: messages[].content (2 times, first: data/a.json, record 1, messages[0])"
    ]


def test_answers_that_mask_history_leaves_out_against_the_record_are_counted(place):
    turns = [turn | {"loss": i % 2} for i, turn in enumerate(TEXT["messages"] * 3)]
    write(FILE, {"messages": turns}, {"messages": TEXT["messages"] * 2})
    assert report_lines(f"{BASIC}.multi_turn=joined") == []
    assert report_lines() == [
        (
            "data: 2 records are trained as several samples, each answer behind its own prompt (multi_turn: joined makes "
            "one sample of them); first: data/a.json, record 1"
        )
    ]
    assert report_lines(f"{BASIC}.mask_history=true") == [
        "data: 2 answers are marked to be trained, but left out by mask_history: true; first: data/a.json, record 1"
    ]


# -- names in attr ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "of", "has"),
    [
        ("images", "record", "'id', 'conversations', 'image'"),
        ("videos", "record", "'id', 'conversations', 'image'"),
        ("tools", "record", "'id', 'conversations', 'image'"),
        ("system", "record", "'id', 'conversations', 'image'"),
        ("messages", "record", "'id', 'conversations', 'image'"),
        ("role_tag", "turn of a record", "'from', 'value'"),
        ("content_tag", "turn of a record", "'from', 'value'"),
    ],
)
@pytest.mark.parametrize("name", ["photo", "photo.path"])
def test_a_field_in_attr_that_no_record_has_is_an_error(setting, of, has, name):
    for more in ([], [CACHE], [CACHE]):  # the last time from the cache
        with pytest.raises(SettingError) as caught:
            loader(f"{ATTR}.{setting}={name}", *more)
        assert str(caught.value) == f"{ATTR}.{setting}: no {of} of data/a.json has a field {name!r}; they have {has}"


def test_one_record_with_the_field_is_enough(place):
    write(
        "data/b.json",
        TEXT,
        TEXT | {"photo": "1.png", "messages": [{"role": "user", "content": "<image>"}, TEXT["messages"][1]]},
    )
    for more in ([], [CACHE], [CACHE]):
        dataset = loader(f"{ATTR}.images=photo", BOTH, *more).dataset
        assert len(dataset) == 14 and dataset.images == loader().dataset.images + 1
    with pytest.raises(SettingError, match=r"attr\.images: no record of data/a\.json has a field 'photo'"):
        loader(f"{ATTR}.images=photo")
    with pytest.raises(SettingError, match=r"attr\.videos: no record of data/a\.json,data/b\.json has a field 'clip'"):
        loader(f"{ATTR}.images=photo", f"{ATTR}.videos=clip", BOTH)


def test_a_skipped_record_with_the_field_is_enough():
    write("data/b.json", TEXT, {"photo": "1.png"})
    assert len(loader(f"{ATTR}.images=photo", BOTH, f"{BASIC}.on_bad_record=skip").dataset) == 13


def test_a_wrong_field_is_reported_before_an_empty_dataset():
    write(FILE, {"turns": TEXT["messages"]})
    with pytest.raises(
        SettingError, match=r"attr\.messages: no record of data/a\.json has a field 'turn'; they have 'turns'$"
    ):
        loader(f"{ATTR}.messages=turn", f"{BASIC}.on_bad_record=skip")


def test_usual_names_and_roles_may_be_absent():
    """Recipes name all of them, also for records of only text."""
    write(FILE, TEXT)
    names = {"images": "images", "videos": "video", "tools": "tools", "system": "system", "role_tag": "role"}
    roles = {"observation_tag": "seen", "function_tag": "call", "system_tag": "rules"}
    assert report_lines(*(f"{ATTR}.{setting}={name}" for setting, name in (names | roles).items())) == []


def test_with_max_samples_a_missing_field_is_only_a_warning():
    write("data/b.json", TEXT | {"photo": "1.png"})
    words = [f"{ATTR}.images=photo", BOTH, f"{BASIC}.max_samples=3"]
    unread, line = report_lines(*words)
    assert unread == "data: nothing of data/b.json is read: max_samples ends before it"
    assert line.startswith(f"data: {ATTR}.images: no record of the first 3 records has a field 'photo'; they have 'id'")
    with pytest.raises(SettingError, match="has a field 'photo'"):
        loader(f"{ATTR}.images=photo", f"{BASIC}.max_samples=13")


def test_files_beyond_max_samples_are_reported():
    write(FILE, TEXT, TEXT)
    for name in ("b", "c"):
        write(f"data/{name}.json", TEXT)
    files = f"{BASIC}.dataset=data/a.json,data/b.json,data/c.json"
    left_out = [f"data: nothing of data/{name}.json is read: max_samples ends before it" for name in ("b", "c")]
    for samples, lines in ((1, left_out), (2, left_out), (3, left_out[1:]), (4, [])):
        assert report_lines(files, f"{BASIC}.max_samples={samples}") == lines


@pytest.mark.parametrize("skips", [[], [f"{BASIC}.on_bad_record=skip"]])
def test_a_file_without_records_is_an_error(skips):
    write("data/b.json")
    with pytest.raises(RecordError, match=r"^data/b\.json: no records$"):
        loader(BOTH, *skips)


def test_validation_checks_only_its_own_fields():
    write(
        "data/b.json",
        TEXT,
        TEXT | {"photo": "1.png", "messages": [{"role": "user", "content": "<image>"}, TEXT["messages"][1]]},
    )
    validation = ["data.val_dataset_param.basic_parameters.dataset=data/a.json", "training.val_interval=1"]
    settings = load_settings("r.yaml", [*validation, f"{BASIC}.dataset=data/b.json", f"{ATTR}.images=photo"])
    MicroBatches(settings, 0, 1)
    assert len(ValidationSet(settings.validation, 0, 1, training_data=settings.data.dataset_param).dataset) == 12
    with pytest.raises(SettingError, match="has a field 'photo'"):
        ValidationSet(settings.validation, 0, 1)
    own = [*validation, "data.val_dataset_param.attr.images=pic"]
    settings = load_settings("r.yaml", own)
    with pytest.raises(SettingError, match="has a field 'pic'"):
        ValidationSet(settings.validation, 0, 1, training_data=settings.data.dataset_param)


# -- images that are not read ----------------------------------------------------------------------


def test_images_in_an_unread_field_are_reported():
    write(
        "data/b.json",
        TEXT,
        TEXT | {"id": 7, "photo": "x/A.JPG"},
        TEXT | {"photo": "b.png"},
        TEXT | {"clips": ["c.webm", "d"]},
    )
    for more in ([], [CACHE], [CACHE]):
        (line,) = report_lines(BOTH, *more)
        assert line == (
            f"{UNREAD_VISUALS}2 records in 'photo', 1 record in 'clips'; name their field in attr.images (or .videos); "
            "first: data/b.json, record 2 (id 7)"
        )
    with pytest.raises(RecordError, match=r"record 2 \(id 7\), messages: 1 image but no <image>"):  # as the line has it
        loader(f"{ATTR}.images=photo", BOTH)


@pytest.mark.parametrize(
    "field",
    [
        {"id": "a.jpg"},
        {"source": "a.jpg of something"},
        {"source": "Draw me\na.jpg"},
        {"source": ["a", "a.jpg"]},
        {"source": {"file": "a.jpg"}},
        {"source": []},
        {"source": 3},
        {"system": "Call it a.jpg"},
        {"image": ""},
    ],
)
def test_fields_that_hold_no_image_are_not_reported(field):
    write("data/b.json", TEXT | field)
    assert report_lines(BOTH) == []


def test_beside_an_image_such_a_field_is_metadata(place):
    for i in range(12):
        change(FILE, f"{i}.source", "a.jpg")(place)
    without = sum("image" not in record for record in json.loads((place / FILE).read_text()))
    (line,) = report_lines()
    assert 0 < without < 12 and line.startswith(f"{UNREAD_VISUALS}{without} records in 'source'; ")


# -- empty answers ---------------------------------------------------------------------------------


def answers(*texts: str) -> dict:
    turns = [{"role": role, "content": said} for text in texts for role, said in (("user", "?"), ("assistant", text))]
    return {"messages": turns}


def test_empty_answers_are_counted():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tool = [TEXT["messages"][0], call, {"role": "tool", "content": ""}, TEXT["messages"][1]]
    write("data/b.json", TEXT, {"messages": tool}, answers("a"), answers("", " \n", "b"), answers("\t"))
    for more in ([], [CACHE], [CACHE]):
        assert report_lines(BOTH, JOINED, *more) == ["data: 3 answers are empty; first: data/b.json, record 4"]
    write("data/b.json", TEXT, answers("a", ""))
    assert report_lines(BOTH, JOINED) == ["data: 1 answer is empty; first: data/b.json, record 2"]


def test_of_an_answer_only_what_follows_its_thought_counts():
    """As where the thought stands in reasoning_content."""
    beside = answers("")
    beside["messages"][1]["reasoning_content"] = "Why?"
    write("data/b.json", TEXT, answers("<think>\nWhy?\n</think>\n\na"), answers("<think>\nWhy?\n</think>\n\n"), beside)
    assert report_lines(BOTH) == ["data: 2 answers are empty; first: data/b.json, record 3"]


def test_of_an_empty_answer_only_the_end_is_trained():
    """This is worth a warning, not an error."""
    write(FILE, answers(" "))
    preparation = Preparation.of(load_settings("r.yaml"))
    dataset = loader().dataset
    ids, labels = dataset[0].input_ids, dataset[0].labels
    assert preparation.tokenizer.decode(ids.tolist()).endswith("assistant\n<think>\n\n</think>\n\n<|im_end|>\n")
    assert preparation.tokenizer.decode(labels[labels >= 0].tolist()) == "<|im_end|>\n"


# -- thoughts and calls that the text holds --------------------------------------------------------


def said(answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer, **more}]}


def published(raw: dict) -> str:
    """A record rendered by the published chat template."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer())
    template = (PUBLISHED / "chat_template.jinja").read_text()
    return tokenizer.apply_chat_template(raw["messages"], chat_template=template, tokenize=False)


@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        ("<think>a</think>KEEP<think>c</think>d", "KEEP"),
        ("KEEP <think>a</think>b", "KEEP"),
        ("<think>KEEP<think>a</think>b", "KEEP"),
        ("<think>a</think>KEEP</think>b", "KEEP"),
    ],
)
@pytest.mark.parametrize("later", [[], said("z")["messages"]])
def test_text_that_the_chat_template_would_drop_is_an_error(answer, lost, later):
    raw = {"messages": said(answer)["messages"] + later}
    assert lost not in published(raw)
    write(FILE, TEXT, raw)
    with pytest.raises(
        RecordError, match=r"a\.json, record 2: turn 1 has several think blocks, or text before its only one"
    ):
        loader()
    write(FILE, raw)
    assert loader(f"{BASIC}.template=qwen3_vl_nothink").samples == 1  # which writes answers as they are
    settings = load_settings("r.yaml")
    record = Record("r", (Turn("user", "?"), Turn("assistant", answer), Turn("user", "?")))
    with pytest.raises(
        RecordError, match=r"^r: turn 1 has several think blocks"
    ):  # nor is the model asked with half of it
        prompt_batch(record, Preparation.of(settings), vision_spec(settings.model.model_name_or_path), thinking=False)


def test_a_thought_without_an_end_is_an_error():
    write(FILE, said("\n<think>\nI was cut o"))
    with pytest.raises(
        RecordError, match="record 1: turn 1 begins with a think block that never ends; leave out answers"
    ):
        loader()
    for answer in (
        "The tag <think> begins a thought.",
        "<think>\na\n</think>\n\nb",
        " \n<think>a</think>b",
        "a\n</think>\n\nb",
    ):
        write(FILE, raw := said(answer))
        dataset = loader().dataset
        assert dataset.preparation.tokenizer.decode(dataset[0].input_ids.tolist()) == published(raw)


def test_thoughts_that_the_chat_template_drops_are_counted():
    raw = {"messages": said("<think>LOST</think>a")["messages"] + said("b", reasoning_content="LOST")["messages"]}
    raw["messages"] += said("c", reasoning_content="kept")["messages"]
    assert "LOST" not in published(raw) and "kept" in published(raw)
    write("data/b.json", TEXT, said("a", reasoning_content="kept"), raw)
    lines = "are dropped, as the chat template does (qwen3_5 keeps those after the user's last question); first: data/b.json"
    for more in ([], [CACHE], [CACHE]):
        assert report_lines(BOTH, JOINED, *more) == [f"data: 2 thoughts {lines}, record 3"]
        (split,) = report_lines(BOTH, *more)
        assert split.startswith("data: 1 record is trained as several samples")
    assert report_lines(BOTH, JOINED, f"{BASIC}.enable_thinking=false") == []
    assert report_lines(BOTH, f"{BASIC}.template=qwen3_vl_nothink") == [f"data: 3 thoughts {lines}, record 2"]


def test_calls_and_responses_spelled_out_in_text_are_counted():
    """The template adds its own tags around a response, and leaves a call as it is."""
    call, response = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "<tool_response>\n1\n</tool_response>"
    turns = [*said(call)["messages"], {"role": "tool", "content": response}, {"role": "assistant", "content": "1"}]
    assert f"<tool_response>\n{response}\n</tool_response>" in published({"messages": turns})
    calls = [{"function": {"name": "f", "arguments": {}}}]
    good = [
        *said("", tool_calls=calls)["messages"],
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "1"},
    ]
    write("data/b.json", {"messages": good}, {"messages": turns})
    (line,) = report_lines(BOTH)
    assert line.startswith("data: 2 turns spell out <tool_call> or <tool_response>, ")
    assert line.endswith("; first: data/b.json, record 2")


# -- make data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_make_data_reports_the_warnings(workers):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]
    records = [{"conversations": turns}] * 600 + [{"conversations": turns, "photo": "x.png"}] * 600
    write(FILE, *records)
    done = run(".", *DATA, "--workers", workers)
    assert done.code == 0, done.err
    assert "\n1,200 answers are empty; first: data/a.json, record 1\n" in done.out
    line = UNREAD_VISUALS.removeprefix("data: ")
    assert f"\n{line}600 records in 'photo'; LLaVA's field is image; first: data/a.json, record 601\n" in done.out
