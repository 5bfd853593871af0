"""Record files are read value by value, with the values and errors of json.loads."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import HAS_PYARROW, UNREADABLE, write_parquet

from qwen35.data import readers
from qwen35.data.readers import list_values, read_values
from qwen35.data.record import LONGEST_MESSAGE, RecordError
from qwen35.errors import SettingError, UserError

VALUE = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)
DAMAGE = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["", "x", '"', "[", "]", "\n", ",", "\\"])), max_size=2
)


def outcome(read):
    try:
        return read()
    except json.JSONDecodeError as error:
        return error.msg, error.lineno, error.colno


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(VALUE, max_size=4), st.sampled_from([None, 1]), st.booleans(), DAMAGE)
def test_values_of_a_list_equal_json_loads(content, indent, ascii_, damage):
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_)
    for place, character in damage:
        at = 1 + int(place * (len(text) - 1))
        text = text[:at] + character + text[at + 1 :]
    assert outcome(lambda: list(list_values(text))) == outcome(lambda: json.loads(text))


PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"a"', b":", b",", b"1e999", b"NaN", b"null", b"\n", b"\xff", b"PAR", b"\xe2\x80\xae"]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(content=st.one_of(st.binary(max_size=40), st.lists(PIECES, max_size=25).map(b"".join)), lenient=st.booleans())
def test_any_bytes_give_values_or_a_printable_error(content, lenient, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    try:
        found = [value for value in read_values(file, lenient) if isinstance(value, RecordError)]
    except UserError as error:
        found = [error]
    assert all(str(error).isprintable() and len(str(error)) <= LONGEST_MESSAGE for error in found)


def test_json_lines_are_never_whole_in_memory(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("\n".join(json.dumps({"id": i, "text": "x" * 1000}) for i in range(20_000)))
    tracemalloc.start()
    count = sum(1 for _ in read_values(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000 and file.stat().st_size > 20_000_000 and peak < 8_000_000


def test_of_a_json_list_only_the_text_is_in_memory(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"a": [[]] * 100}] * 20_000))  # values take ten times the memory of their text
    tracemalloc.start()
    count = sum(1 for _ in read_values(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000 and peak < 2.2 * file.stat().st_size


def test_a_json_list_too_large_to_be_read_whole_is_refused(tmp_path, monkeypatch):
    """The command that the message gives makes JSON lines of it."""
    file = tmp_path / "a b.json"
    records = [{"a": "é"}, {"a": 2}]
    file.write_text(json.dumps(records))
    monkeypatch.setattr(readers, "LARGEST_LIST", 20)
    with pytest.raises(RecordError, match=r"a b\.json: is a JSON list of 27 bytes, more than 20, and ") as caught:
        list(read_values(file))
    command = str(caught.value).partition("one by one: ")[2]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert list(read_values(tmp_path / "a b.jsonl")) == records


def test_values_before_an_error_are_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[{"a": 1},\n {"a": 2}, {"a" 3}]')
    read = read_values(file)
    assert [next(read), next(read)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(
        RecordError, match=r"a\.json: not JSON: Expecting ':' delimiter at line 2, column 17, after 2 records$"
    ):
        next(read)


def test_the_first_byte_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'["' + b"x" * 3_000_000 + "é".encode() + b'", "\xff"]')
    with pytest.raises(RecordError, match=r"a\.json: not UTF-8 text: .* at byte 3000008$"):
        list(read_values(file))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (json.dumps({"messages": [{"role": "user"}]}, indent=2), "record 1: not JSON: Expecting property name"),
        ("question,answer\nWhat?,That.\n", "record 1: not JSON: Expecting value"),
        ('{"a": 1} {"a": 2}\n', "record 1: not JSON: Extra data at column 10"),
        ('{"a": 1}\n{"a": 2}, {"a": 3}\n', "record 2: not JSON: Extra data at column 9"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_another_format_is_told_the_supported_ones(tmp_path, text, where, lenient):
    file = tmp_path / "a.json"
    file.write_text(text)
    if lenient and where.startswith("record 2"):  # one line of several
        assert str(list(read_values(file, lenient))[1]).endswith("parquet")
        return
    with pytest.raises(RecordError) as caught:
        list(read_values(file, lenient))
    assert str(caught.value).startswith(f"{file}, {where}")
    assert str(caught.value).endswith("; expected a JSON list, one JSON object per line, or parquet")


def test_a_truncated_line_is_not_told_the_supported_formats(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(RecordError, match=r"record 2: not JSON: Expecting value at column 1 of its line$"):
        list(read_values(file))


def archives(file):
    """Archives of each kind that Python can write, and the first bytes of others."""
    text = b'[{"a": 1}]'
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.json", text)
    yield file.read_bytes()
    yield from (gzip.compress(text), bz2.compress(text), lzma.compress(text))
    yield b"\x28\xb5\x2f\xfd\x20\x0a" + text  # zstd
    yield b"7z\xbc\xaf\x27\x1c\x00\x04"


@pytest.mark.parametrize("lenient", [False, True])
def test_archives_are_refused(tmp_path, lenient):
    file = tmp_path / "a.json"
    for data in archives(file):
        file.write_bytes(data)
        with pytest.raises(RecordError, match=r"a\.json: is compressed; unpack it first$"):
            list(read_values(file, lenient))


LOSSY = {
    '{"role": "user", "content": "a", "content": "b"}': "the key 'content' appears twice in one object; keep one of them",
    '{"a": {"b": [{"c": 1, "c": 1}]}}': "the key 'c' appears twice",
    '{"weight": 1e400}': "the number 1e400 is too large to be represented; write it as text",
    '{"weight": -1e400}': "the number -1e400 is too large",
    '{"weight": NaN}': "NaN is not a number in JSON; write null or leave the key out",
    '{"weight": [-Infinity]}': "-Infinity is not a number in JSON",
}


@pytest.mark.parametrize("form", ["lines", "list"])
@pytest.mark.parametrize("text", LOSSY)
def test_json_that_would_lose_data_is_an_error(tmp_path, text, form):
    """With skip, only such a record is left out."""
    file, good = tmp_path / "a.json", '{"weight": 1e300, "a": {"b": 1, "c": {"b": 2}}}'
    file.write_text(f"[{good}, {text}, {good}]" if form == "list" else f"{good}\n{text}\n{good}\n")
    with pytest.raises(RecordError, match=rf"a\.json, record 2: {LOSSY[text]}"):
        list(read_values(file))
    first, wrong, last = read_values(file, lenient=True)
    assert first == last == json.loads(good) and isinstance(wrong, RecordError)


@pytest.mark.parametrize("form", ["lines", "list"])
def test_an_oversized_record_is_refused_before_it_is_read(tmp_path, form, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_VALUE", 3_000_000)
    file, good, large = tmp_path / "a.json", '{"a": 1}', f'{{"a": "{"x" * 30_000_000}"}}'
    file.write_text(f"[{good}, {large}, {good}]" if form == "list" else f"{good}\n{large}\n{good}\n")
    words = r"record 2: (JSON that cannot be read: )?has more than 3,000,000 bytes; keep images in files"
    tracemalloc.start()
    with pytest.raises(RecordError, match=words):
        list(read_values(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 27_000_000 or form == "list"  # its text is in memory
    first, wrong, last = read_values(file, lenient=True)
    assert first == last == {"a": 1} and isinstance(wrong, RecordError)


def test_parquet(tmp_path, monkeypatch):
    records = [{"id": i, "messages": [{"role": "user", "content": f"é{i}"}]} for i in range(5)]
    write_parquet(tmp_path / "a.parquet", records, monkeypatch)
    assert list(read_values(tmp_path / "a.parquet")) == records
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(RecordError, match=r"b\.parquet: parquet that cannot be read: ") as caught:
        list(read_values(tmp_path / "b.parquet"))
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.json").write_bytes(b"PAR1")  # the content decides
    with pytest.raises(
        SettingError, match=r"a\.json: is a parquet file, and pyarrow is missing; install it \(.*pip install"
    ):
        list(read_values(tmp_path / "a.json"))


def test_only_needed_columns_are_read(tmp_path, monkeypatch):
    """Others may hold gigabytes, or values that Python cannot hold."""
    records = [{"messages": [i], "extra": "é"} for i in range(3)]
    write_parquet(tmp_path / "a.parquet", records, monkeypatch)
    read = list(read_values(tmp_path / "a.parquet", needs_column={"messages", "images"}.__contains__))
    assert read == [{"messages": [i], "extra": "(a column that is not read)"} for i in range(3)]
    read = list(read_values(tmp_path / "a.parquet", needs_column=lambda _: False))
    assert read == [dict.fromkeys(records[0], "(a column that is not read)")] * 3


def test_maps_are_refused_where_their_column_is_read(tmp_path, monkeypatch):
    """They would be trained as lists of pairs: "properties": [["city", {"type": "string"}]]."""
    tools = [{"name": "f", "parameters": {"properties": [("city", {"type": "string"})]}}]
    if HAS_PYARROW:
        import pyarrow as pa
        from pyarrow import parquet

        properties = pa.map_(pa.string(), pa.struct([("type", pa.string())]))
        tool = pa.struct([("name", pa.string()), ("parameters", pa.struct([("properties", properties)]))])
        table = pa.table({"messages": ["x"], "tools": pa.array([tools], pa.list_(tool))})
        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        write_parquet(tmp_path / "a.parquet", [{"messages": "x", "tools": tools}], monkeypatch)
    with pytest.raises(
        RecordError, match=r"a\.parquet, column 'tools': holds maps, .*; write them as structs, or as JSON"
    ):
        list(read_values(tmp_path / "a.parquet"))
    (read,) = read_values(tmp_path / "a.parquet", needs_column={"messages"}.__contains__)
    assert read["messages"] == "x"


def test_a_column_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    if HAS_PYARROW:
        import pyarrow as pa
        from pyarrow import parquet

        wrong = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
        columns = {"id": pa.array([1], pa.timestamp("ns")), "messages": ["x"], "system": wrong}
        parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    else:
        write_parquet(tmp_path / "a.parquet", [{"id": UNREADABLE, "messages": "x", "system": UNREADABLE}], monkeypatch)
    for column in ("id", "system"):
        with pytest.raises(RecordError, match=rf"a\.parquet, column '{column}': cannot be read: ") as caught:
            list(read_values(tmp_path / "a.parquet", needs_column={"messages", column}.__contains__))
        assert "\n" not in str(caught.value)
    (read,) = read_values(tmp_path / "a.parquet", needs_column={"messages"}.__contains__)
    assert read["messages"] == "x"
