"""JSON written from an Arrow table: the nulls it filled in are dropped, others stay."""

import json

import pytest
from optional import HAS_PYARROW, write_parquet

from qwen35.config.schema import Attr
from qwen35.data import readers
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.fields import FieldNames
from qwen35.data.formats import parse_record, read_records
from qwen35.data.media import ImageFolder
from qwen35.data.readers import read_values
from qwen35.data.style import Style
from qwen35.data.template import render, training_pieces


def tool(name, **properties):
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


STRING = {"type": "string"}
ASKED = {"role": "user", "content": "Weather in Oslo, and the price of ABC?"}
ANSWER = {"role": "assistant", "content": "Rain, 12."}
# as somebody writes it, and as `Dataset.to_json` writes the table that was made of it
WRITTEN = {
    "messages": [
        ASKED,
        {"role": "assistant", "tool_calls": [call("weather", city="Oslo"), call("price", ticker="ABC")]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "12"},
        ANSWER,
    ],
    "tools": [tool("weather", city=STRING), tool("price", ticker=STRING)],
}
ALIGNED = {
    "messages": [
        ASKED | {"tool_calls": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call("weather", city="Oslo", ticker=None), call("price", ticker="ABC", city=None)],
        },
        {"role": "tool", "content": "rain", "tool_calls": None},
        {"role": "tool", "content": "12", "tool_calls": None},
        ANSWER | {"tool_calls": None},
    ],
    "tools": [tool("weather", city=STRING, ticker=None), tool("price", ticker=STRING, city=None)],
}
NO_CALLS = {
    "messages": [ASKED | {"tool_calls": None}, ANSWER | {"tool_calls": None}],
    "tools": [tool("weather", city=STRING, ticker=None)],
}


def lines(folder, *records):
    file = folder / "a.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


def text(folder, file):
    (record,) = read_records(file, Attr(), ImageFolder(folder))
    return render(training_pieces(record, Style()))


@pytest.mark.parametrize("form", ["lines", "list"])
def test_nulls_filled_in_by_a_table_are_not_trained(tmp_path, form):
    file, warnings = lines(tmp_path, ALIGNED), DataWarnings()
    if form == "list":
        file.write_text(json.dumps([ALIGNED]))
    assert list(read_values(file, warnings=warnings)) == [WRITTEN]
    (line,) = warnings.lines()
    assert line.startswith("1 record has nulls that a table filled in; they are dropped, as from a parquet file")
    assert line.endswith(f"; first: {file}, record 1")
    written = text(tmp_path, file)
    assert "None" not in written and "null" not in written
    assert written == text(tmp_path, lines(tmp_path, WRITTEN))


def test_json_from_a_table_reads_like_parquet(tmp_path, monkeypatch):
    """pyarrow, if installed, aligns the objects and writes them as in the cases above."""
    write_parquet(tmp_path / "a.parquet", [WRITTEN] if HAS_PYARROW else [ALIGNED], monkeypatch)
    assert list(read_values(tmp_path / "a.parquet")) == list(read_values(lines(tmp_path, ALIGNED))) == [WRITTEN]


def test_nulls_are_judged_by_the_whole_file(tmp_path):
    """A tool alone could have such a parameter; its neighbours show where the null is from."""
    read = list(read_values(lines(tmp_path, *[NO_CALLS] * 3, ALIGNED)))
    assert read[0]["tools"] == [tool("weather", city=STRING)] and read[3] == WRITTEN


def test_a_null_property_was_filled_in_by_a_table(tmp_path):
    (read,) = read_values(lines(tmp_path, NO_CALLS))
    assert read["tools"] == [tool("weather", city=STRING)]


@pytest.mark.parametrize("form", ["lines", "list"])
def test_nulls_behind_a_thousand_records_without_any_are_judged_alike(tmp_path, form):
    """In whatever order the records stand: the first ones may all have what a later one lacks."""
    full, less = ({"a": {"x": 1, "y": y}} for y in (2, None))
    for records in ([full] * 1200 + [less], [less] + [full] * 1200):
        file = lines(tmp_path, *records)
        if form == "list":
            file.write_text(json.dumps(records, indent=1))
        warnings = DataWarnings()
        read = list(read_values(file, warnings=warnings))
        assert read[records.index(less)] == {"a": {"x": 1}}
        assert "1 record has nulls that a table filled in" in warnings.lines()[0]


def test_a_long_file_without_nulls_is_read_once(tmp_path, monkeypatch):
    file, reads = lines(tmp_path, *[{"a": {"x": "null", "y": 2}}] * 3000), []
    monkeypatch.setattr(readers, "is_from_table", lambda values, *undecided: reads.append(undecided) or None)
    assert len(list(read_values(file))) == 3000 and reads == [(readers.UNDECIDED,)]


GENUINE = {"messages": [ASKED, {"role": "assistant", "tool_calls": [call("weather", city="Oslo", unit=None)]}]}
DEFAULT = {"messages": [ASKED, ANSWER], "tools": [tool("weather", city=STRING | {"default": None})]}


WRITTEN_NULLS = {
    "an argument": [GENUINE],
    "an argument twice": [GENUINE, GENUINE],
    "a default": [DEFAULT],
    "a default in one of two": [DEFAULT, {"messages": [ASKED, ANSWER], "tools": [tool("weather", city=STRING)]}],
    "a record that cannot come from the table": [ALIGNED, WRITTEN],
    "late in the file": [ALIGNED] * 1500 + [GENUINE],
    "text and objects": [{"turns": [{"value": call("f", a=None)}, {"value": "x"}, {"value": None}]}] * 2,
    "text and numbers": [
        {"a": None, "b": {"x": None}},
        {"a": 1, "b": {"x": "text"}},
        {"a": 2, "b": {"x": 3}},
    ],
}


@pytest.mark.parametrize("name", WRITTEN_NULLS)
def test_nulls_written_by_hand_stay(tmp_path, name):
    records = WRITTEN_NULLS[name]
    warnings = DataWarnings()
    assert list(read_values(lines(tmp_path, *records), warnings=warnings)) == records
    assert warnings.lines() == []


def test_a_null_argument_is_trained(tmp_path):
    record = parse_record(
        {"messages": [*GENUINE["messages"], {"role": "tool", "content": "x"}, ANSWER]},
        "x",
        FieldNames.of(Attr()),
        ImageFolder(tmp_path),
        DataWarnings(),
    )
    assert "<parameter=unit>\nNone\n</parameter>" in render(training_pieces(record, Style()))


def test_lists_keep_their_nulls_and_deep_nesting_does_not_crash(tmp_path):
    enum = {"messages": [{"a": [1, None], "b": None}, {"a": [2, None], "b": 1}]}
    assert list(read_values(lines(tmp_path, enum))) == [{"messages": [{"a": [1, None]}, {"a": [2, None], "b": 1}]}]
    deep = None
    for _ in range(300):
        deep = {"a": deep}
    assert list(read_values(lines(tmp_path, {"x": deep, "y": None}, {"x": deep, "y": 1})))[1] == {"x": deep, "y": 1}
