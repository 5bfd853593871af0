"""Every field of a record is read, harmless, refused or counted; none is dropped in silence."""

import json

import pytest
from mistakes import BASIC, DATA, EVALUATE, SHOW, place, run, whole

from qwen35.config.load import load_settings
from qwen35.config.schema import Attr
from qwen35.data import MicroBatches
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.fields import (
    HARMLESS_IN_CALLS,
    HARMLESS_IN_ITEMS,
    HARMLESS_IN_RECORDS,
    HARMLESS_IN_TURNS,
    PREFERENCES,
    REFUSED_IN_CALLS,
    REFUSED_IN_ITEMS,
    REFUSED_IN_RECORDS,
    REFUSED_IN_TURNS,
)
from qwen35.data.formats import read_records
from qwen35.data.media import ImageFolder
from qwen35.data.record import RecordError
from qwen35.errors import SettingError

__all__ = ["place", "whole"]  # fixtures

Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TEXT = {"messages": [Q, A]}
CALL = {"name": "f", "arguments": {}}
NOT_READ = "fields that are not read: "


def with_field(where, name, value):
    """Records with the field at the top, in a turn, in a content item, in a call."""
    field = {name: value}
    item = {"type": "text", "text": "Q"}
    return {
        "record": {"messages": [Q, A], **field},
        "turn": {"messages": [Q, A | field]},
        "item": {"messages": [Q | {"content": [item | field]}, A]},
        "call": {"messages": [Q, A | {"tool_calls": [{"function": CALL | field}]}]},
    }[where]


def read(folder, *records, attr=None):
    (folder / "x.json").write_text(json.dumps(records))
    warnings = DataWarnings()
    records = list(read_records(folder / "x.json", attr or Attr(), ImageFolder(folder), warnings=warnings))
    return records, warnings.lines()


REFUSED = [
    (where, name, harmless)
    for where, table in (
        ("record", REFUSED_IN_RECORDS | PREFERENCES),
        ("turn", REFUSED_IN_TURNS),
        ("item", REFUSED_IN_ITEMS),
        ("call", REFUSED_IN_CALLS),
    )
    for name, (_, harmless) in table.items()
]


@pytest.mark.parametrize(("where", "name", "harmless"), REFUSED)
def test_fields_refused_by_name(tmp_path, where, name, harmless):
    for value in ("x", ["x"], {"x": 0}, 2, *([] if harmless in (False, None) else [False, 0])):
        with pytest.raises(RecordError, match=rf"x\.json, record 1.*: has {name}, which is not read; .{{10}}"):
            read(tmp_path, with_field(where, name, value))
    for value in (None, "", [], {}, [None], *([] if harmless is None else [harmless])):
        assert read(tmp_path, with_field(where, name, value))[1] == []


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ("record", "{}"),
        ("turn", "messages[].{}"),
        ("item", "messages[].content[].{}"),
        ("call", "messages[].tool_calls[].function.{}"),
    ],
)
def test_other_fields_are_counted_harmless_or_instructions(tmp_path, where, path):
    records, warnings = read(tmp_path, TEXT, *[with_field(where, "mystery", 0)] * 2, with_field(where, "other", False))
    assert len(records) == 4
    first = {"record": "", "turn": ", messages[1]", "item": ", messages[0].content[0]"}.get(
        where, ", messages[1].tool_calls[0].function"
    )
    at = f"{tmp_path}/x.json, record "
    counted = [f"{path} (2 times, first: {at}2{first})", f"{path} (1 time, first: {at}4{first})"]
    assert warnings == [NOT_READ + ", ".join(counted).replace("{}", "mystery", 1).replace("{}", "other")]
    for name in {
        "record": HARMLESS_IN_RECORDS,
        "turn": HARMLESS_IN_TURNS,
        "item": HARMLESS_IN_ITEMS,
        "call": HARMLESS_IN_CALLS,
    }[where] - {"id"}:
        assert read(tmp_path, with_field(where, name, "x"))[1] == []
    for name in (
        "loss_masks",
        "isTrainable",
        "token-weights",
        "LABELS",
        "bboxes",
        "REJECTED_answer",
        "unmasked",
        "supervised",
        "ignored",
    ):
        with pytest.raises(RecordError, match=f"has {name}, which is not read but looks like an instruction about tr"):
            read(tmp_path, with_field(where, name, 0))
        assert read(tmp_path, with_field(where, name, None))[1] == []
    for name in ("trainer", "glossary", "constraint", "weightlessness", "boxer", "objective"):
        assert len(read(tmp_path, with_field(where, name, 0))[1]) == 1


def test_fields_of_another_kind_of_item_are_counted(tmp_path):
    """The `url` of a text item may be an image, and `prompt` a system prompt."""
    items = [
        {"type": "text", "text": "Q", "url": "a.jpg"},
        {"text": "R", "path": "b.jpg"},
        {"type": "image", "image": "c.jpg", "sample_fps": 2},
    ]
    ((record,), warnings) = read(tmp_path, {"messages": [Q | {"content": items}, A], "prompt": "You are a pirate."})
    assert [part for part in record.turns[0].parts if isinstance(part, str)] == ["QR"]
    at = f"first: {tmp_path}/x.json, record 1"
    names = {"url": 0, "path": 1, "sample_fps": 2}
    found = [f"messages[].content[].{name} (1 time, {at}, messages[0].content[{i}])" for name, i in names.items()]
    assert warnings == [f"{NOT_READ}prompt (1 time, {at}), {', '.join(found)}"]


def test_arguments_beside_their_function_are_refused(tmp_path):
    """The chat template reads only a call's function, and would train a call without them."""

    def calls(call):
        return {"messages": [Q, A | {"tool_calls": [{"type": "function", "function": {"name": "f"}} | call]}]}

    for arguments in ({"a": 1}, '{"a": 1}'):
        with pytest.raises(
            RecordError, match=r"tool_calls\[0\]: has arguments, which is not read; in a call with a function object"
        ):
            read(tmp_path, calls({"arguments": arguments}))
    assert read(tmp_path, calls({"arguments": {}}))[1] == []
    first = f"first: {tmp_path}/x.json, record 1, messages[1].tool_calls[0])"
    assert read(tmp_path, calls({"name": "g"}))[1] == [f"{NOT_READ}messages[].tool_calls[].name (1 time, {first}"]
    for function, wrong in (({"name": ""}, "is empty"), ({"arguments": {}}, "is null, not text")):
        with pytest.raises(RecordError, match=rf"tool_calls\[0\]\.name: {wrong}"):
            read(tmp_path, calls({"function": function}))


def test_fields_named_in_attr_are_read_whatever_their_name(tmp_path):
    turns = [{"label": "user", "mask": "Q"}, {"label": "assistant", "mask": "A", "weight": 0}]
    raw = {"objects": {"chosen": turns, "seen": 1}, "system_prompt": "S"}
    attr = Attr(messages="objects.chosen", role_tag="label", content_tag="mask", system="system_prompt")
    ((record,), warnings) = read(tmp_path, raw, attr=attr)
    assert [turn.content for turn in record.turns] == ["S", "Q", "A"]
    assert record.turns[-1].loss is False
    assert warnings == [f"{NOT_READ}objects.seen (1 time, first: {tmp_path}/x.json, record 1)"]
    with pytest.raises(
        RecordError, match=r"record 1\.objects: has rejected_mask, which is not read but looks like an instr"
    ):
        read(tmp_path, raw | {"objects": {"chosen": turns, "rejected_mask": 1}}, attr=attr)


def test_fields_inside_another_field_are_not_read(tmp_path):
    attr = Attr(messages="data.turns", content_tag="message.content")

    def record(more):
        turns = [
            {"role": turn["role"], "message": {"content": turn["content"], "model": "m"} | more} for turn in (Q, A)
        ]
        return {"data": {"turns": turns}}

    assert read(tmp_path, record({}), attr=attr)[1] == []
    first = f"first: {tmp_path}/x.json, record 1, data.turns[0])"
    assert read(tmp_path, record({"mystery": 1}), attr=attr)[1] == [
        f"{NOT_READ}data.turns[].message.mystery (2 times, {first}"
    ]
    for name in ("loss", "weight", "tool_calls", "reasoning_content"):
        with pytest.raises(
            RecordError, match=rf"turns\[0\]\.message: has {name}, which is not read; it is not read inside"
        ):
            read(tmp_path, record({name: 1}), attr=attr)
    raw = record({})
    raw["data"]["loss_mask"] = [0, 1]
    with pytest.raises(
        RecordError, match=r"record 1\.data: has loss_mask, which is not read; it is not read inside another"
    ):
        read(tmp_path, raw, attr=attr)


def test_fields_that_attr_ignores(tmp_path):
    attr = Attr(ignore=("label", "token_mask", "mystery", "weight", "photo", "parameters", "fps"))
    call = {"name": "f", "arguments": {}, "parameters": 1}
    turns = [
        Q | {"content": [{"type": "text", "text": "Q", "fps": 1}]},
        A | {"weight": 0.5, "mystery": 1, "tool_calls": [call]},
    ]
    records, warnings = read(
        tmp_path, {"messages": turns, "label": "x", "token_mask": [1], "photo": "a.jpg"}, attr=attr
    )
    assert records[0].turns[1].loss is None and warnings == []
    masked = {"messages": [Q, A], "loss_mask": [0, 0]}
    assert read(tmp_path, masked, attr=Attr(ignore=("loss_mask",)))[0][0].turns[1].loss is None
    for attr in (Attr(ignore=("images",)), Attr(messages="a.b", ignore=("a",)), Attr(ignore=("tool_calls",))):
        with pytest.raises(
            SettingError, match=f"attr.ignore: {attr.ignore[0]} is read; only fields that are not read can be ign"
        ):
            read(tmp_path, TEXT, attr=attr)


def test_images_named_in_the_text(tmp_path):
    """This is the format of the first Qwen-VL."""
    for text in ("Picture 1: <img>a/b.jpeg</img>\nWhat?", "<video>https://x/y.mp4</video>"):
        raw = {"messages": [Q | {"content": text}, A]}
        if "<video>" in text:
            with pytest.raises(
                RecordError,
                match=r"has <image> or <video> but no image or video; <video>…</video> in a text looks like one",
            ):
                read(tmp_path, raw)
        else:
            assert read(tmp_path, raw)[1][0].startswith(
                "possible images or videos that are not read, in records that have none: 1 record in '<img>…</img> in a"
            )
    for text in ("<b>a.jpg</b>", "<video src=a.mp4></video>", "<img> or </img>", "<img>the cat.</img>"):
        ((record,), warnings) = read(tmp_path, {"messages": [Q | {"content": text}, A]})
        assert record.turns[0].content == text and warnings == []


def test_attr_chooses_the_trained_side_of_preference_pairs(tmp_path):
    raw = {"messages": [Q], "chosen": [Q, A], "rejected": "B", "rejected_images": ["b.png"]}
    ((record,), warnings) = read(tmp_path, raw, attr=Attr(messages="chosen"))
    assert record.turns[-1].content == "A"
    assert warnings[-1].startswith(f"{NOT_READ}messages (1 time, first: ") and ", rejected (1 time" in warnings[-1]


def test_many_unread_fields_are_summed_up(tmp_path):
    """This happens where the keys of an object are data."""
    (_, (line,)) = read(tmp_path, TEXT | {f"x{i}": 1 for i in range(1000)})
    assert len(line) < 2500 and ", … (980 times, first: " in line


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    records = json.loads((place / "data/a.json").read_text())
    records[2]["mystery"] = 1
    records[4]["conversations"][1]["mood"] = "glad"
    (place / "data/a.json").write_text(json.dumps(records))
    return place


FOUND = [
    "mystery (1 time, first: data/a.json, record 3 (id r2))",
    "conversations[].mood (1 time, first: data/a.json, record 5 (id r4), conversations[1])",
]


def test_a_run_reports_unread_fields_also_from_the_cache(here):
    more = here / "data/b.json"
    more.write_text(json.dumps([TEXT, TEXT | {"mystery": 2}]))
    for cache in ([], ["cache"], ["cache"]):
        words = [f"{BASIC}.dataset=data/a.json,data/b.json", *(f"{BASIC}.cache_dir={name}" for name in cache)]
        lines = MicroBatches(load_settings("r.yaml", words), 0, 1).report().splitlines()
        assert lines[1:] == [f"data: {NOT_READ}{FOUND[0].replace('1 time', '2 times')}, {FOUND[1]}"]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ((*SHOW, "--samples", "12"), f"--- of the records shown:\n{NOT_READ}{', '.join(FOUND)}\n"),
        ((*DATA, "--workers", "2"), f"\n{NOT_READ}{', '.join(FOUND)}\n"),
        (EVALUATE, f"data: {NOT_READ}{', '.join(FOUND)}\n"),
    ],
    ids=["show", "data", "evaluate"],
)
def test_every_command_that_reads_records_reports_unread_fields(here, command, line):
    done = run(here, *command)
    assert done.code == 0, done.err
    assert line in (done.err if command is EVALUATE else done.out)


def test_doctor_reports_unread_fields(here):
    from qwen35.tools.doctor.host import Machine
    from qwen35.tools.doctor.recipe import look

    settings = load_settings("r.yaml")
    found: list = []
    look(Machine(), settings, found, 1)
    assert ("note", f"{NOT_READ}{', '.join(FOUND)}") in [(f.status, f.fact) for f in found]


def test_an_instruction_stops_a_run_and_can_be_skipped(here):
    records = json.loads((here / "data/a.json").read_text())
    records[7]["label"], records[8]["label"] = False, True
    (here / "data/a.json").write_text(json.dumps(records))
    with pytest.raises(
        RecordError, match=r"record 8 \(id r7\): has label, which is not read; only records with good answers"
    ):
        MicroBatches(load_settings("r.yaml"), 0, 1)
    assert MicroBatches(load_settings("r.yaml", [f"{BASIC}.on_bad_record=skip"]), 0, 1).samples == 11
