"""Records in every supported format, and errors that name the field in broken ones."""

import base64
import json

import pytest
from optional import write_parquet

from qwen35.config.load import SettingError
from qwen35.config.schema import Attr
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.formats import read_records
from qwen35.data.media import ImageFolder
from qwen35.data.mixture import dataset_files
from qwen35.data.record import RecordError, ToolCall, Turn, Video

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


def test_attr_chooses_the_trained_answer_of_a_preference_pair(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    raw = {"messages": turns[:1], "chosen": turns, "rejected": turns[:1]}
    (record,) = read(tmp_path, [raw], Attr(messages="chosen"))
    assert record.turns[1].content == "Yo"


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_formats_may_be_mixed_in_one_file(tmp_path, lines):
    a, b, c = read(tmp_path, [LLAVA, MESSAGES, TEXT], lines=lines)
    assert a.turns == (Turn("user", (tmp_path / "a.jpg", "\nWhat?")), Turn("assistant", "A cat."))
    assert a.images == (tmp_path / "a.jpg",)
    assert [turn.role for turn in b.turns] == ["system", "user", "assistant"]
    assert b.turns[2].reasoning == "hm"
    assert b.images == (tmp_path / "a.jpg", tmp_path / "sub" / "b.jpg")
    assert c.images == ()
    assert a.source == f"{tmp_path}/x.json, record 1 (id a7)"
    assert c.source == f"{tmp_path}/x.json, record 3"


def test_the_format_is_told_by_content_not_name(tmp_path):
    assert len(read_text(tmp_path, "\ufeff  \n [" + json.dumps(TEXT) + "]")) == 1
    assert len(read_text(tmp_path, "\n" + json.dumps(TEXT) + "\n\n" + json.dumps(TEXT) + "\n")) == 2
    separators = {"messages": [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "d"}]}
    assert len(read_text(tmp_path, json.dumps(separators, ensure_ascii=False))) == 1


def test_the_many_ways_to_have_no_image(tmp_path):
    for image in (None, "", []):
        assert read(tmp_path, [TEXT | {"image": image}])[0].images == ()


def test_limit(tmp_path):
    assert len(read(tmp_path, [TEXT, TEXT, {"broken": 1}], limit=2)) == 2


def test_fields_of_other_names(tmp_path):
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


def item(kind, **more):
    return {"type": kind, **more}


def asked(*items, **fields):
    return {"messages": [turn("user", list(items)), turn("assistant", "A")], **fields}


def test_content_lists(tmp_path):
    records = [
        asked(item("text", text="a"), item("image", image="a.jpg"), item("text", text="b")),
        asked(item("image_url", image_url={"url": "a.jpg"}), item("image_url", image_url="b.jpg")),
        asked(item("video", video="v.mp4"), {"image": "a.jpg"}, {"text": "t"}),
        asked(item("video", video=["1.png", "2.png"], sample_fps=3), item("video_url", video_url={"url": "d/v"})),
        asked(item("image"), item("text", text="?"), item("image"), images=["a.jpg", "b.jpg"]),
        asked(item("image", path=f"file://{tmp_path}/a.jpg"), item("text", text="?", image=None)),
    ]
    a, b = tmp_path / "a.jpg", tmp_path / "b.jpg"
    expected = [
        ("a", a, "b"),
        (a, b),
        (Video(tmp_path / "v.mp4"), a, "t"),
        (Video((tmp_path / "1.png", tmp_path / "2.png"), 3.0), Video(tmp_path / "d" / "v")),
        (a, "?", b),
        (a, "?"),
    ]
    assert [record.turns[0].content for record in read(tmp_path, records)] == expected


def test_visuals_come_in_order_of_appearance(tmp_path):
    record = {"images": ["a.jpg", "b.jpg"], "videos": ["v.mp4"], "messages": [turn("user", "<image><video> x <image>")]}
    record["messages"].append(turn("assistant", "<image>"))  # what the model says is text
    (r,) = read(tmp_path, [record])
    assert r.visuals == [tmp_path / "a.jpg", Video(tmp_path / "v.mp4"), tmp_path / "b.jpg"]


def test_videos_from_a_field(tmp_path):
    frames = Video((tmp_path / "1.png", tmp_path / "2.png"))
    for value, expected in [
        ("v.mp4", [Video(tmp_path / "v.mp4")]),
        (["v.mp4", "w.mp4"], [Video(tmp_path / "v.mp4"), Video(tmp_path / "w.mp4")]),
        ([["1.png", "2.png"], "v.mp4"], [frames, Video(tmp_path / "v.mp4")]),
        ({"frames": ["1.png", "2.png"], "sample_fps": 0.5}, [Video(frames.source, 0.5)]),
        ("", []),
    ]:
        record = {"video": value, "messages": [turn("user", "<video>" * len(expected)), turn("assistant", "A")]}
        assert list(read(tmp_path, [record])[0].videos) == expected


def test_sharegpt_with_system_and_tools(tmp_path):
    call = {"name": "f", "arguments": {"a": 1}}
    record = {
        "system": "S",
        "tools": json.dumps([{"name": "f"}]),
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "5"},
            {"from": "gpt", "value": "A"},
        ],
    }
    spelt = call | {"arguments": '{"a": 1}'}
    openai = {
        "tools": [{"name": "f"}],
        "messages": [
            turn("developer", "S"),
            turn("user", "Q"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": spelt}],
            },
            turn("tool", "5"),
            turn("assistant", "A"),
        ],
    }
    ours, theirs = read(tmp_path, [record, openai])
    turns = (
        Turn("system", "S"),
        Turn("user", "Q"),
        Turn("assistant", "", None, (ToolCall("f", {"a": 1}),)),
        Turn("tool", "5"),
    )
    assert ours.turns == theirs.turns == (*turns, Turn("assistant", "A"))
    assert ours.tools == theirs.tools == ({"type": "function", "function": {"name": "f"}},)


def test_tools_have_the_form_in_which_servers_pass_them(tmp_path):
    """Also where records list bare functions, or hold objects as JSON text."""
    function = {"name": "f", "description": "é <b>", "parameters": {"type": "object", "properties": {}}}
    wanted = {"type": "function", "function": function}
    forms = (
        wanted,
        function,
        {"type": "function", **function},
        {"type": None, "function": None, **function},
        {"function": function},
        {"type": "function", "function": json.dumps(function)},
        {"type": "function", "function": function | {"parameters": json.dumps(function["parameters"])}},
    )
    asked = [turn("user", "Q"), turn("assistant", "A")]
    warnings = DataWarnings()
    for form in forms:
        (tmp_path / "x.json").write_text(json.dumps([{"messages": asked, "tools": [form]}]))
        (record,) = read_records(tmp_path / "x.json", Attr(), ImageFolder(tmp_path), warnings=warnings)
        assert json.dumps(record.tools) == json.dumps([wanted])  # in this order, which the template keeps
    (line,) = warnings.lines()
    assert line.startswith("6 records have tools without the OpenAI API's form, as which servers pass them; they are")
    kept = {"function": function | {"strict": True}, "type": "function", "x": 1}
    other = {"type": "web_search", "name": "w"}
    (record,) = read(tmp_path, [{"messages": asked, "tools": [kept, other]}])
    assert json.dumps(record.tools) == json.dumps([kept, other])
    for tool, message in (
        ({"type": "function", "function": [1]}, r"tools\[0\]\.function: is a list, not an object"),
        ({"type": "function", "function": "f("}, r"tools\[0\]\.function: 'f\(' is not JSON"),
        ({"name": "f", "input_schema": {"type": "object"}}, r"tools\[0\]: has input_schema, which no server passes on"),
        ({"name": "f", "parameters": "f("}, r"tools\[0\]\.parameters: 'f\(' is not JSON"),
    ):
        with pytest.raises(RecordError, match=message):
            read(tmp_path, [{"messages": asked, "tools": [tool]}])


def test_dotted_names_in_attr(tmp_path):
    attr = Attr(
        messages="data.dialog", images="data.pics", content_tag="message.text", observation_tag="O", function_tag="F"
    )
    said = [("user", "<image>"), ("F", '{"name": "f"}'), ("O", "5"), ("assistant", "A")]
    dialog = [{"role": role, "message": {"text": text}} for role, text in said]
    (record,) = read(tmp_path, [{"data": {"dialog": dialog, "pics": ["a.jpg"]}}], attr)
    assert [t.role for t in record.turns] == ["user", "assistant", "tool", "assistant"]
    assert record.turns[1].tool_calls == (ToolCall("f"),) and record.images == (tmp_path / "a.jpg",)


PNG = b"\x89PNG what comes then is for the decoder to judge"


def test_embedded_images_are_stored_as_files(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    records = [asked(item("image_url", image_url={"url": url})), LLAVA | {"image": url}]
    with pytest.raises(RecordError, match="holds an embedded image; set cache_dir"):
        read(tmp_path, records)
    folder = ImageFolder(tmp_path, tmp_path / "cache")
    one, two = read_records(tmp_path / "x.json", Attr(), folder)
    assert one.images == two.images and one.images[0].is_relative_to(tmp_path / "cache" / "images")
    assert one.images[0].read_bytes() == PNG
    one.images[0].write_bytes(b"cut")  # a crash of long ago
    assert folder.store(PNG).read_bytes() == PNG
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 1


def test_images_in_parquet(tmp_path, monkeypatch):
    records = [
        {"images": [{"bytes": PNG, "path": None}], "messages": [turn("user", "<image>"), turn("assistant", "A")]},
        {"images": [{"bytes": None, "path": "a.jpg"}], "messages": [turn("user", "<image>"), turn("assistant", "A")]},
    ]
    write_parquet(tmp_path / "x.parquet", records, monkeypatch)
    held, named = read_records(tmp_path / "x.parquet", Attr(), ImageFolder(tmp_path, tmp_path / "cache"))
    assert held.images[0].read_bytes() == PNG and named.images == (tmp_path / "a.jpg",)
    assert held.source == f"{tmp_path}/x.parquet, record 1"


def test_fields_that_are_null_in_parquet_are_absent(tmp_path, monkeypatch):
    """Columns give each object the fields of all others, as null."""
    calls = [
        {"name": "f", "arguments": {"city": "Rome", "n": None}},
        {"name": "g", "arguments": {"city": None, "n": 3}},
    ]
    turns = [turn("user", "x"), turn("assistant", "") | {"tool_calls": calls}]
    tools = [{"name": "f", "parameters": {"city": {"type": "string"}, "n": None}}]
    write_parquet(tmp_path / "x.parquet", [{"messages": turns, "tools": tools}], monkeypatch)
    (record,) = read_records(tmp_path / "x.parquet", Attr(), ImageFolder(tmp_path))
    assert record.turns[-1].tool_calls == (ToolCall("f", {"city": "Rome"}), ToolCall("g", {"n": 3}))
    (tool,) = record.tools
    assert tool["function"] == {"name": "f", "parameters": {"city": {"type": "string"}}}


def turn(role, content):
    return {"role": role, "content": content}


def test_weights_of_slimorca_are_accepted(tmp_path):
    """`weight` of SlimOrca: 0 for the user, 1 for the assistant, null for the system."""
    turns = [turn("user", "x") | {"weight": 0.0}, turn("assistant", "y") | {"weight": 1.0, "loss": True, "train": None}]
    (record,) = read(tmp_path, [{"messages": [turn("system", "s") | {"weight": None}, *turns]}])
    assert [t.content for t in record.turns] == ["s", "x", "y"]


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
        r"messages\[0\]: assistant turn where user",
    ),
    "twice the user": (
        [{"messages": [turn("user", "x")] * 2}],
        r"messages\[1\]: user turn where assistant",
    ),
    "system later": (
        [{"messages": [turn("user", "x"), turn("system", "y")]}],
        r"messages\[1\]: system turn where assistant is expected",
    ),
    "only system": ([{"messages": [turn("system", "x")]}], r"messages: has no user turn"),
    "no answer": (
        [{"messages": [turn("user", "x")]}],
        r"messages\[0\]: ends with a user turn; there is no answer to train on",
    ),
    "reasoning": (
        [{"messages": [turn("user", "x"), turn("assistant", "y") | {"reasoning_content": 3}]}],
        r"messages\[1\]\.reasoning_content: is a number, not text",
    ),
    "a call beside the text": (
        [{"messages": [turn("user", "x"), turn("assistant", "y") | {"function_call": {"name": "f"}}]}],
        r"messages\[1\]: has function_call, which is not read; calls are read from tool_calls",
    ),
    "a thought of another name": (
        [{"messages": [turn("user", "x"), turn("assistant", "y") | {"reasoning": "why"}]}],
        r"messages\[1\]: has reasoning, which is not read; thoughts are read from reasoning_content",
    ),
    "functions": (
        [TEXT | {"functions": [{"name": "f"}]}],
        r"record 1: has functions, which is not read; functions are read from the field tools",
    ),
    "a preference pair": (
        [TEXT | {"chosen": TEXT["conversations"][1], "rejected": {"from": "gpt", "value": "No"}}],
        r"record 1: has chosen, which is not read; training.stage: dpo learns from preference pairs; without it attr.messages",
    ),
    "no placeholder": (
        [TEXT | {"image": "a.jpg"}],
        r"conversations: 1 image but no <image> in the user and tool turns; put one where each image belongs",
    ),
    "too many placeholders": (
        [MESSAGES | {"images": "a.jpg"}],
        r"messages: 2 <image> in the user and tool turns, but 1 image; one that is plain text belongs in a content list",
    ),
    "too few placeholders": (
        [LLAVA | {"image": ["a.jpg", "b.jpg"]}],
        r"1 <image> in the user and tool turns, but 2 images$",
    ),
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
    "image in the text and beside it": (
        [asked(item("image", image="a.jpg"), image="b.jpg")],
        r"has images in content lists and in a field of the record; keep one",
    ),
    "item without a type": (
        [asked({"x": 1})],
        r"content\[0\]: has no type; supported are text, image, image_url, video",
    ),
    "item of another type": (
        [asked(item("audio", audio="x"))],
        r"content\[0\]: has type 'audio'; supported are text, image",
    ),
    "text without text": ([asked(item("text"))], r"content\[0\]\.text: is null, not text"),
    "two images in an item": (
        [asked(item("image", image="a.jpg", url="b.jpg"))],
        r"content\[0\]: has image and url, which differ; keep one",
    ),
    "two images in an object": (
        [asked({"type": "image", "image": {"path": "a.jpg", "url": "b.jpg"}})],
        r"content\[0\]\.image: has path and url, which differ; keep one",
    ),
    "two videos in an object": (
        [LLAVA | {"image": None, "video": {"frames": ["a.jpg"], "path": "v.mp4"}}],
        r"video: has frames and path, which differ; keep one",
    ),
    "an image in an item of text": (
        [asked(item("text", text="x", image_url={"url": "b.jpg"}))],
        r"content\[0\]: has type text and also image_url; put each in an item of its own",
    ),
    "image of the assistant": (
        [{"messages": [turn("user", "x"), turn("assistant", [item("image", image="a.jpg")])]}],
        r"messages\[1\]\.content\[0\]: an image in a turn of the assistant; only user and tool turns have any",
    ),
    "size of one image": (
        [asked(item("image", image="a.jpg", max_pixels=100))],
        r"content\[0\]: has max_pixels, which is not read; preprocess_parameters apply to all records",
    ),
    "rate of one video": ([asked(item("video", video="v", fps=1))], r"content\[0\]: has fps, which is not read"),
    "rate that is none": ([asked(item("video", video="v", sample_fps=0))], r"video: sample_fps: 0 is not a number of"),
    "address": ([asked(item("image", image="http://x/a.jpg"))], r"image: 'http://x/a\.jpg' is a URL; only files"),
    "file elsewhere": ([asked(item("image", image="file:///etc/x"))], r"image: '/etc/x' lies outside dataset_dir"),
    "not base64": (
        [LLAVA | {"image": "data:image/png;base64,???"}],
        r"image: 'data:image/png;base64,\?\?\?'… is not base64",
    ),
    "no image in base64": (
        [LLAVA | {"image": "data:text/html,x"}],
        r"image: 'data:text/html,x'… is not an image in base64",
    ),
    "no video": ([asked(item("video"))], r"messages: 1 <video> in the user and tool turns, but 0 videos$"),
    "video without a place": ([TEXT | {"videos": ["v"]}], r"1 video but no <video> in the user and tool turns"),
    "no frames": (
        [asked(item("video", video=[]))],
        r"messages: 1 <video> in the user and tool turns, but 0 videos$",
    ),
    "frame is a number": ([asked(item("video", video=["a", 1]))], r"content\[0\]\.video\[1\]: is a number, not a path"),
    "two systems": (
        [{"system": "a", "messages": [turn("system", "b"), turn("user", "x"), turn("assistant", "y")]}],
        r"record 1: has both a system turn and the field system; keep one",
    ),
    "tools are text": ([TEXT | {"tools": "f"}], r"record 1, tools: 'f' is not JSON"),
    "tool is a name": ([TEXT | {"tools": ["f"]}], r"record 1, tools: is a list, not a list of objects"),
    "call of the user": (
        [{"messages": [turn("user", "x") | {"tool_calls": [{"name": "f"}]}]}],
        r"messages\[0\]: tool_calls in a turn of the user; only the assistant calls tools",
    ),
    "call without a name": (
        [{"messages": [turn("user", "x"), turn("assistant", "") | {"tool_calls": [{"arguments": {}}]}]}],
        r"messages\[1\]\.tool_calls\[0\]\.name: is null, not text",
    ),
    "arguments are a list": (
        [{"messages": [turn("user", "x"), turn("function_call", '{"name": "f", "arguments": [1]}')]}],
        r"messages\[1\]\.content\[0\]\.arguments: is a list, not an object",
    ),
    "tool first": (
        [{"messages": [turn("user", "x"), turn("tool", "y")]}],
        r"messages\[1\]: tool turn where assistant is expected",
    ),
    "ends with a tool": (
        [{"messages": [turn("user", "x"), turn("assistant", "y"), turn("tool", "z")]}],
        r"messages\[2\]: ends with a tool turn; there is no answer to train on",
    ),
    "two image fields": ([LLAVA | {"images": ["a.jpg"]}], r"has both images and image; say in attr which one counts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records_are_named(tmp_path, case):
    records, message = BROKEN[case]
    with pytest.raises(RecordError, match=message) as caught:
        read(tmp_path, records)
    assert str(caught.value).startswith(f"{tmp_path}/x.json, record 1")
    assert "\n" not in str(caught.value)


def test_errors_are_one_line_whatever_the_file_names(tmp_path):
    (record,) = read(tmp_path, [LLAVA | {"image": "a\nb\x1b[2J\x85.jpg"}])
    error = record.error(f"{record.images[0]}: no such file")
    assert str(error).endswith(r"/a\x0ab\x1b[2J\x85.jpg: no such file")


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
