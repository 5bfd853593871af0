"""Records in every form that people bring, and an error that names the place for every one that is broken."""

import json

import pytest

from qwen35.config import SettingError
from qwen35.data.folder import ImageFolder
from qwen35.data.formats import read_records
from qwen35.data.mixture import dataset_files
from qwen35.data.record import RecordError, Turn
from qwen35.settings import Attr

LLAVA = {
    "id": "a7",
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}
MESSAGES = {
    "images": ["./a.jpg", "sub/b.jpg"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image> or <image>?"},
        {"role": "assistant", "content": "Both.", "reasoning_content": "hm"},
    ],
}
TEXT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}


def read(tmp_path, records, attr=None, lines=False, **options):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    return read_text(tmp_path, text, attr, **options)


def read_text(tmp_path, text, attr=None, **options):
    file = tmp_path / "x.json"
    file.write_text(text, encoding="utf-8")
    return list(read_records(file, attr or Attr(), ImageFolder(tmp_path), **options))


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_forms_mixed_in_one_file(tmp_path, lines):
    a, b, c = read(tmp_path, [LLAVA, MESSAGES, TEXT], lines=lines)
    assert a.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    assert a.images == (tmp_path / "a.jpg",)
    assert [turn.role for turn in b.turns] == ["system", "user", "assistant"]
    assert b.turns[2].reasoning == "hm"
    assert b.images == (tmp_path / "a.jpg", tmp_path / "sub" / "b.jpg")
    assert c.images == ()
    assert a.source == f"{tmp_path}/x.json, record 1 (id a7)"
    assert c.source == f"{tmp_path}/x.json, record 3"


def test_content_decides_not_the_name(tmp_path):
    assert len(read_text(tmp_path, "\ufeff  \n [" + json.dumps(TEXT) + "]")) == 1
    assert len(read_text(tmp_path, "\n" + json.dumps(TEXT) + "\n\n" + json.dumps(TEXT) + "\n")) == 2
    separators = {"messages": [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "d"}]}
    assert len(read_text(tmp_path, json.dumps(separators, ensure_ascii=False))) == 1


def test_no_image_in_many_ways(tmp_path):
    for image in (None, "", []):
        assert read(tmp_path, [TEXT | {"image": image}])[0].images == ()


def test_limit(tmp_path):
    assert len(read(tmp_path, [TEXT, TEXT, {"broken": 1}], limit=2)) == 2


def test_other_names(tmp_path):
    attr = Attr(
        messages="dialog",
        images="pics",
        role_tag="who",
        content_tag="says",
        user_tag="Q",
        assistant_tag="A",
        system_tag="S",
    )
    turns = [("S", "s"), ("Q", "<image>"), ("A", "fine")]
    other = {"pics": "a.jpg", "dialog": [{"who": who, "says": says} for who, says in turns]}
    ours, usual = read(tmp_path, [other, LLAVA], attr)
    assert [turn.role for turn in ours.turns] == ["system", "user", "assistant"]
    assert len(ours.images) == len(usual.images) == 1


def test_attr_chooses_between_two_fields(tmp_path):
    both = TEXT | MESSAGES
    with pytest.raises(
        RecordError, match=r"record 1: has both messages and conversations; say in attr which one counts"
    ):
        read(tmp_path, [both])
    assert len(read(tmp_path, [both], Attr(messages="messages"))[0].turns) == 3


def turn(role, content):
    return {"role": role, "content": content}


BROKEN = {
    "not an object": ([7], r"x\.json, record 1: is a number, not an object"),
    "no messages": (
        [{"id": 3, "text": "x"}],
        r"record 1 \(id 3\): has no field messages or conversations; it has 'id', 'text'",
    ),
    "messages are text": ([{"messages": "x"}], r"record 1, messages: is text, not a list of turns"),
    "no turns": ([{"messages": []}], r"record 1, messages: is empty, not a list of turns"),
    "turn is text": ([{"messages": ["x"]}], r"messages\[0\]: is text, not an object"),
    "no role": ([{"messages": [{"content": "x"}]}], r"messages\[0\]: has no field role or from"),
    "no content": ([{"messages": [{"role": "user"}]}], r"messages\[0\]: has no text in content or value"),
    "content is null": ([{"messages": [turn("user", None)]}], r"messages\[0\]: has no text in content or value"),
    "content is a number": ([{"messages": [turn("user", 3)]}], r"messages\[0\]\.content: is a number, not text"),
    "content is a list of text": (
        [{"messages": [turn("user", ["x"])]}],
        r"messages\[0\]\.content\[0\]: is text, not an object with a type",
    ),
    "unknown role": (
        [{"messages": [turn("critic", "x")]}],
        r"messages\[0\]\.role: 'critic' is not one of user, human, assist",
    ),
    "role is a number": ([{"messages": [turn(1, "x")]}], r"messages\[0\]\.role: 1 is not one of"),
    "surrogate": ([{"messages": [turn("user", "\ud800")]}], r"messages\[0\]\.content: half a surrogate pair"),
    "answer first": (
        [{"messages": [turn("assistant", "x")]}],
        r"messages\[0\]: a turn of the assistant where one of the u",
    ),
    "twice the user": (
        [{"messages": [turn("user", "x")] * 2}],
        r"messages\[1\]: a turn of the user where one of the ass",
    ),
    "system later": (
        [{"messages": [turn("user", "x"), turn("system", "y")]}],
        r"messages\[1\]: a turn of the system where one of the assistant belongs",
    ),
    "only system": ([{"messages": [turn("system", "x")]}], r"messages: has no turn of the user"),
    "no answer": (
        [{"messages": [turn("user", "x")]}],
        r"messages\[0\]: ends with the user; there is no answer to train on",
    ),
    "reasoning": (
        [{"messages": [turn("user", "x"), turn("assistant", "y") | {"reasoning_content": 3}]}],
        r"messages\[1\]\.reasoning_content: is a number, not text",
    ),
    "no placeholder": (
        [TEXT | {"image": "a.jpg"}],
        r"conversations: 1 image but no <image> in what the user says; put one where each image belongs",
    ),
    "too many placeholders": (
        [MESSAGES | {"images": "a.jpg"}],
        r"messages: 2 <image> in what the user says, but 1 image$",
    ),
    "too few placeholders": (
        [LLAVA | {"image": ["a.jpg", "b.jpg"]}],
        r"1 <image> in what the user says, but 2 images$",
    ),
    "no image": ([LLAVA | {"image": None}], r"1 <image> in what the user says, but 0 images$"),
    "image is a number": (
        [LLAVA | {"image": 3}],
        r"record 1 \(id a7\), image: is a number, not a path",
    ),
    "image is an object": ([LLAVA | {"image": [{"name": "x"}]}], r"image\[0\]: is an object, not a path"),
    "image above": ([LLAVA | {"image": "../a.jpg"}], r"image: '\.\./a\.jpg' lies outside dataset_dir"),
    "image elsewhere": ([LLAVA | {"image": "/etc/passwd"}], r"image: '/etc/passwd' lies outside dataset_dir"),
    "image is a folder above": ([LLAVA | {"image": "sub/.."}], r"image: 'sub/\.\.' is not a file name"),
    "image with NUL": ([LLAVA | {"image": "a\0.jpg"}], r"image: has a NUL character"),
    "image with a long name": ([LLAVA | {"image": "a" * 5000}], r"image: 'a+': File name too long"),
    "two image fields": ([LLAVA | {"images": ["a.jpg"]}], r"has both images and image; say in attr which one counts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records_are_named(tmp_path, case):
    records, message = BROKEN[case]
    with pytest.raises(RecordError, match=message) as caught:
        read(tmp_path, records)
    assert str(caught.value).startswith(f"{tmp_path}/x.json, record 1")
    assert "\n" not in str(caught.value)


BROKEN_FILES = {
    "": r"x\.json: is empty",
    "[{]": r"x\.json: not JSON: .* at line 1, column 3",
    '{"a": 1}\n{"a": }': r"x\.json, record 2: not JSON: Expecting value at column 7 of its line",
    "[" * 100_000: r"x\.json: JSON that cannot be read",
}


@pytest.mark.parametrize("text", BROKEN_FILES, ids=lambda text: text[:10])
def test_broken_files_are_named(tmp_path, text):
    with pytest.raises(RecordError, match=BROKEN_FILES[text]):
        for _ in read_records(write(tmp_path, text), Attr(messages="a"), ImageFolder(tmp_path), limit=None):
            pass


def write(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    if text.startswith("{"):  # a good first line, so that the second is reached
        file.write_text(text.replace('{"a": 1}', json.dumps(TEXT)))
    return file


def test_not_utf8(tmp_path):
    (tmp_path / "x.json").write_bytes(b'["\xff"]')
    with pytest.raises(RecordError, match=r"x\.json: not UTF-8 text"):
        list(read_records(tmp_path / "x.json", Attr(), ImageFolder(tmp_path)))


def test_links_out_of_the_folder_are_refused(tmp_path):
    data = tmp_path / "data"
    (data / "inside").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"")
    (data / "file.jpg").symlink_to(tmp_path / "secret.jpg")
    (data / "folder").symlink_to(tmp_path)
    (data / "good").symlink_to(data / "inside")
    (data / "loop").symlink_to(data / "loop")
    folder = ImageFolder(data)
    for name in ("file.jpg", "folder/secret.jpg", "inside/../../secret.jpg", str(tmp_path / "secret.jpg")):
        with pytest.raises(ValueError, match="lies outside dataset_dir"):
            folder.path(name)
    assert folder.path("good/a.jpg") == data / "inside" / "a.jpg"
    assert folder.path(str(data / "a.jpg")) == data / "a.jpg"
    folder.path("loop")  # whether it can be read shows later


def test_dataset_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text("[]")
    assert len(dataset_files(f"./a.json,{tmp_path}/b.json")) == 2
    with pytest.raises(SettingError, match=r"basic_parameters\.dataset: c\.json: no such file below"):
        dataset_files("a.json,c.json")
    with pytest.raises(SettingError, match="names no file"):
        dataset_files(" , ")
