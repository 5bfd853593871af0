"""Turns in all their forms: consecutive calls, images from tools, loss masks in the record.

The expected text is from transformers' apply_chat_template, for the same or an equivalent record.
"""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizer_fixture import PUBLISHED, make_model_folder

from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.fields import FieldNames
from qwen35.data.formats import parse_record
from qwen35.data.image_processor import ImageProcessor
from qwen35.data.media import ImageFolder
from qwen35.data.preparation import Preparation
from qwen35.data.record import RecordError
from qwen35.data.style import Style
from qwen35.data.template import render, training_pieces
from qwen35.data.tokenized import tokenised
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VideoProcessor


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("turns")
    make_model_folder(place / "hf")
    (place / "images").mkdir()
    for i in range(3):
        Image.new("L", (40 + 32 * i, 40), i * 40).save(place / f"images/000{i}.png")
    return place


@pytest.fixture(scope="module")
def preparation(place):
    images = ImageProcessor.from_folder(place / "hf", 1024, 4096)
    videos = VideoProcessor.from_folder(place / "hf", PreprocessParameters())
    basic = BasicParameters("x", dataset_dir=str(place))
    return Preparation(ChatTokenizer(place / "hf"), images, basic, Attr(), videos)


@pytest.fixture(scope="module")
def hf_tokenizer(place):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(place / "hf" / "tokenizer.json"))


@pytest.fixture
def make(place, preparation, hf_tokenizer):
    """record -> (its ids, equal to transformers', and its trained stretches as text).

    meant: an equivalent record that the template can render; settings: of basic_parameters, which
    make one sample of each record here, so that it is compared whole.
    """

    def make(raw, meant=None, warned=(), **settings):
        p = replace(preparation, basic=replace(preparation.basic, multi_turn="joined", **settings))
        file = place / "r.json"
        file.write_text(json.dumps([raw]))
        warnings = DataWarnings()
        ((_, ((record, sample),)),) = tokenised(file, p, warnings=warnings)
        assert warnings.lines() == [*warned]
        meant = meant or raw
        chat = {"chat_template": (PUBLISHED / "chat_template.jinja").read_text(), "tokenize": False}
        text = hf_tokenizer.apply_chat_template(meant["messages"], tools=meant.get("tools"), **chat)
        pads = iter(grid[1] * grid[2] // 4 for grid in sample.grids)
        text = re.sub(r"<\|image_pad\|>", lambda pad: pad[0] * next(pads), text)
        assert sample.ids.tolist() == hf_tokenizer(text, add_special_tokens=False).input_ids
        stretches, before = [], False
        for token, now in zip(sample.ids.tolist(), sample.loss_mask.tolist(), strict=True):
            if now:
                stretches = stretches if before else [*stretches, []]
                stretches[-1].append(token)
            before = now
        return record, [p.tokenizer.decode(stretch) for stretch in stretches]

    return make


def refused(place, preparation, raw, message):
    (place / "r.json").write_text(json.dumps([raw]))
    with pytest.raises(RecordError, match=message) as caught:
        list(tokenised(place / "r.json", preparation))
    assert "\n" not in str(caught.value)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def called(*arguments, content="", **more):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": x}}} for x in arguments]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def written(*xs):
    """The text of tool calls."""
    texts = [f"<tool_call>\n<function=f>\n<parameter=x>\n{x}\n</parameter>\n</function>\n</tool_call>" for x in xs]
    return "\n".join(texts)


END = "<|im_end|>\n"
Q, A = said("user", "Q"), said("assistant", "A")

# -- images of tools -------------------------------------------------------------------------------

SCREENSHOT = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "screenshot", "arguments": {}}}]}
IMAGE = {"type": "image", "image": "images/0000.png"}
SHOT = f"<tool_call>\n<function=screenshot>\n</function>\n</tool_call>{END}"
OPEN = [said("user", "Open the page."), SCREENSHOT]
TOOLS = [{"type": "function", "function": {"name": "screenshot"}}]


@pytest.mark.parametrize(
    "after", [[], [said("tool", "2")], [said("tool", [IMAGE, {"type": "text", "text": "<image>"}])]]
)
def test_a_tool_may_return_an_image(make, after):
    shows = said("tool", [{"type": "text", "text": " here: "}, IMAGE])
    calls = SCREENSHOT | {"tool_calls": SCREENSHOT["tool_calls"] * (1 + len(after))}
    record, trained = make({"messages": [OPEN[0], calls, shows, *after, said("assistant", "A zero.")], "tools": TOOLS})
    assert len(record.images) == 1 + sum(isinstance(turn["content"], list) for turn in after)
    assert trained == [SHOT[: -len(END)] + (f"\n{SHOT}" if after else END), f"A zero.{END}"]


def test_a_tool_response_may_have_a_placeholder(make, place):
    turns = [*OPEN, said("tool", "here: <image>"), said("assistant", "A zero.")]
    meant = [*OPEN, said("tool", [{"type": "text", "text": "here: "}, IMAGE]), said("assistant", "A zero.")]
    record, trained = make(
        {"messages": turns, "tools": TOOLS, "images": ["images/0000.png"]}, {"messages": meant, "tools": TOOLS}
    )
    assert record.images == (place / "images/0000.png",)
    assert trained == [SHOT, f"A zero.{END}"]


def test_a_user_image_after_a_tool_response(make):
    turns = [
        *OPEN,
        said("tool", "shown"),
        said("user", [IMAGE, {"type": "text", "text": "This?"}]),
        said("assistant", "A zero."),
    ]
    _, trained = make({"messages": turns, "tools": TOOLS})
    assert trained == [SHOT, f"A zero.{END}"]


def test_images_come_in_the_order_of_the_turns(make, place):
    turns = [said("user", "<image>"), SCREENSHOT, said("tool", "<image>"), said("user", "<image>"), A]
    names = [f"images/000{i}.png" for i in (2, 0, 1)]
    shown = [[{"type": "image"}] if turn["content"] == "<image>" else turn["content"] for turn in turns]
    meant = [turn | {"content": content} for turn, content in zip(turns, shown, strict=True)]
    record, _ = make({"messages": turns, "images": names}, {"messages": meant})
    assert record.visuals == [place / name for name in names]


# -- placeholders that are text --------------------------------------------------------------------


def test_a_placeholder_without_images_is_text(make, place):
    turns = [
        said("user", "How do I use the <video> tag in HTML5?"),
        said("assistant", "Put <video src=x></video> there."),
    ]
    warned = f"1 placeholder (<image>, <video>) is kept as text; first: {place}/r.json, record 1"
    _, trained = make({"messages": turns}, warned=[warned])
    assert trained == [f"Put <video src=x></video> there.{END}"]


def test_a_placeholder_in_a_content_list_is_text(make, place):
    user = said("user", [IMAGE, {"type": "text", "text": "What does the <image> element in this SVG do?"}])
    record, trained = make({"messages": [user, said("assistant", "It draws.")]})
    assert record.turns[0].content == (place / "images/0000.png", "What does the <image> element in this SVG do?")
    assert trained == [f"It draws.{END}"]
    listed = said("user", [{"type": "text", "text": "<image> and <video>"}])
    make(
        {"messages": [listed, A, said("user", "<image>"), A], "images": "images/0000.png"},
        {"messages": [listed, A, said("user", [IMAGE]), A]},
    )


def test_image_and_video_placeholders_are_independent(make, place):
    """In a record with images only, `<video>` is text."""
    turns = [said("user", "<image> in <video>"), said("assistant", "<image>")]
    meant = [said("user", [IMAGE, {"type": "text", "text": " in <video>"}]), said("assistant", "<image>")]
    warned = f"2 placeholders (<image>, <video>) are kept as text; first: {place}/r.json, record 1"
    make({"messages": turns, "image": "images/0000.png"}, {"messages": meant}, warned=[warned])


def test_a_placeholder_beside_an_unread_image_is_an_error(place, preparation):
    raw = {"messages": [said("user", "<image>"), A], "photo": "images/0000.png"}
    refused(
        place,
        preparation,
        raw,
        "has <image> or <video> but no image or video; photo looks like one: name its field in attr.images",
    )
    raw["source"] = raw.pop("photo")
    (place / "r.json").write_text(json.dumps([raw]))
    assert len(list(tokenised(place / "r.json", preparation))) == 1  # where it came from


# -- calls and answers in a row --------------------------------------------------------------------


def share(*turns):
    """A record in ShareGPT's format."""
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


CALL_1, CALL_2 = (json.dumps({"name": "f", "arguments": {"x": x}}) for x in (1, 2))
JOINED = {
    "two calls": (
        share(("human", "Q"), ("function_call", CALL_1), ("function_call", CALL_2), ("observation", "r1"),
              ("observation", "r2"), ("gpt", "A")),
        [Q, called(1, 2), said("tool", "r1"), said("tool", "r2"), A],
    ),
    "a text, then a call": (
        share(("human", "Q"), ("gpt", "Let me look."), ("function_call", CALL_1), ("observation", "r1"), ("gpt", "A")),
        [Q, called(1, content="Let me look."), said("tool", "r1"), A],
    ),
    "a thought and a text, then calls": (
        share(("human", "Q"), ("gpt", "<think>\nwhy\n</think>\n\nLet me look."), ("function_call", f"[{CALL_1}, {CALL_2}]"),
              ("function_call", CALL_1), *[("observation", "r")] * 3, ("gpt", "A")),
        [Q, called(1, 2, 1, content="<think>\nwhy\n</think>\n\nLet me look."), *[said("tool", "r")] * 3, A],
    ),
    "ms-swift's roles": (
        {"messages": [Q, said("tool_call", CALL_1), said("tool_call", CALL_2), said("tool_response", "r1"),
                      said("tool_response", "r2"), A]},
        [Q, called(1, 2), said("tool", "r1"), said("tool", "r2"), A],
    ),
    "calls after each other": (
        share(("human", "Q"), ("function_call", CALL_1), ("observation", "r1"), ("function_call", CALL_2),
              ("observation", "r2"), ("gpt", "A")),
        [Q, called(1), said("tool", "r1"), called(2), said("tool", "r2"), A],
    ),
    "at the end": (
        share(("human", "Q"), ("gpt", "Look:"), ("function_call", CALL_1), ("function_call", CALL_2)),
        [Q, called(1, 2, content="Look:")],
    ),
    "turns of the assistant": (
        {"messages": [Q, said("assistant", "Look:"), called(1, content=None), called(2), said("tool", "r1"),
                      said("tool", "r2"), A]},
        [Q, called(1, 2, content="Look:"), said("tool", "r1"), said("tool", "r2"), A],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", JOINED)
def test_calls_join_the_answer_before(case, make):
    raw, meant = JOINED[case]
    record, _ = make(raw, {"messages": meant})
    assert [turn.role for turn in record.turns] == [turn["role"] for turn in meant]


def test_all_of_a_joined_answer_is_trained(make):
    raw, meant = JOINED["a thought and a text, then calls"]
    _, trained = make(raw, {"messages": meant})
    assert trained == [f"why\n</think>\n\nLet me look.\n\n{written(1, 2, 1)}{END}", f"A{END}"]


def numbered(*ids):
    calls = called(*range(len(ids)))
    return calls | {"tool_calls": [call | {"id": own} for call, own in zip(calls["tool_calls"], ids, strict=True)]}


def test_responses_come_in_the_order_of_their_calls(make, place):
    turns = [Q, numbered("a", "b"), said("tool", "of b", tool_call_id="b"), said("tool", "of a", tool_call_id="a"), A]
    warned = f"2 tool responses were moved into the order of the calls; first: {place}/r.json, record 1"
    make({"messages": turns}, {"messages": [*turns[:2], turns[3], turns[2], A]}, warned=[warned])
    make({"messages": [*turns[:2], turns[3], turns[2], A]})
    numbers = [Q, numbered(0, 1), said("tool", "of 1", tool_call_id=1), said("tool", "of 0", tool_call_id="0"), A]
    make({"messages": numbers}, {"messages": [*numbers[:2], numbers[3], numbers[2], A]}, warned=[warned])
    make({"messages": [*turns[:2], said("tool", "1"), said("tool", "2", tool_call_id="b"), A]})  # the other has none
    make({"messages": [*turns[:2], said("tool", "1"), said("tool", "2", tool_call_id=""), A]})  # by their order


TEXT = st.lists(st.sampled_from(["Hi", " ", "\n", "é", "<image>", "<video>", "<tool_response>", "x1"]), max_size=4).map(
    "".join
)
ITEMS = st.lists(
    st.one_of(TEXT.map(lambda text: {"type": "text", "text": text}), st.just(IMAGE)), min_size=1, max_size=3
)
SAID = st.one_of(TEXT, st.just("<think>\nwhy\n</think>\n\nLet me look."))


@st.composite
def agents(draw):
    """ShareGPT turns, and the messages that they stand for."""
    raw, meant = [], []
    for _ in range(draw(st.integers(1, 2))):
        for _ in range(draw(st.integers(1, 2))):
            asked, text = draw(ITEMS), draw(SAID)
            xs = draw(st.lists(st.one_of(st.integers(0, 9), TEXT, st.none()), min_size=1, max_size=3))
            calls = [{"name": "f", "arguments": {"x": x}} for x in xs]
            responses = draw(st.lists(ITEMS, min_size=len(xs), max_size=len(xs)))
            meant += [said("user", asked), called(*xs, content=text), *(said("tool", items) for items in responses)]
            first = draw(st.integers(1, len(calls)))  # the first turn of calls has so many of them
            groups = [calls[:first], *([call] for call in calls[first:])]
            raw += [("human", asked), *([("gpt", text)] if text else [])]
            raw += [
                *(("function_call", json.dumps(group)) for group in groups),
                *(("observation", items) for items in responses),
            ]
        answer = draw(SAID)
        raw.append(("gpt", answer))
        meant.append(said("assistant", answer))
    return share(*raw), meant


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(agents())
def test_random_sharegpt_turns_render_like_messages(place, hf_tokenizer, both):
    raw, meant = both
    record = parse_record(raw, "r", FieldNames.of(Attr()), ImageFolder(place), DataWarnings())
    chat = {"chat_template": (PUBLISHED / "chat_template.jinja").read_text(), "tokenize": False}
    assert render(training_pieces(record, Style())) == hf_tokenizer.apply_chat_template(meant, **chat)
    assert len(record.images) == json.dumps(meant).count("images/0000.png")


WRONG = {
    "too few responses": ([Q, called(1, 2), said("tool", "r"), A], r"\[1\]: 2 calls but 1 tool response after it"),
    "too many": ([Q, called(1), *[said("tool", "r")] * 2, A], r"\[1\]: 1 call but 2 tool responses after it"),
    "none": ([Q, called(1), Q, A], r"\[1\]: 1 call but 0 tool responses after it; each call needs one tool turn"),
    "an answer instead": ([Q, called(1), A], r"messages\[2\]: assistant turn where user is expected"),
    "other ids": (
        [Q, numbered("a", "b"), *[said("tool", "r", tool_call_id=i) for i in "ac"], A],
        r"\[1\]: the calls' ids are a, b, but the responses have a, c",
    ),
    "ids of some, in another order": (
        [Q, numbered("a", "b"), said("tool", "r", tool_call_id="b"), said("tool", "r"), A],
        r"\[1\]: the calls' ids are a, b, but the responses have b, None",
    ),
    "an id twice": (
        [Q, numbered("a", "a"), *[said("tool", "r", tool_call_id="a")] * 2, A],
        r"\[1\]: the calls' ids are a, a, but the responses have a, a",
    ),
    "two texts": ([Q, said("assistant", "a"), A], r"messages\[2\]: assistant turn where user is expected"),
    "a text in the second": (
        [Q, said("assistant", "a"), called(1, content="b")],
        r"messages\[2\]: assistant turn where user is expected",
    ),
    "a thought in the second": (
        [Q, said("assistant", "a"), called(1, reasoning_content="why")],
        r"messages\[2\]: assistant turn where user is expected",
    ),
    "a call in two ways": (
        [Q, said("tool_call", CALL_1) | {"tool_calls": called(2)["tool_calls"]}],
        r"messages\[1\]: has tool_calls in a turn of the role tool_call, whose content is the call; keep one",
    ),
    "half of it trained": (
        [Q, said("assistant", "a", loss=0), called(1, loss=1)],
        r"messages\[2\]: a call and the answer before it are one turn; train both or neither",
    ),
    "a thought of the user": ([Q | {"reasoning_content": "why"}, A], r"\[0\]: reasoning_content in a turn of the user"),
    "arguments of another name": (
        [Q, said("tool_call", '{"name": "f", "parameters": {"x": 1}}')],
        r"content\[0\]: has parameters, which is not read; the arguments of a call are read from arguments",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_calls_and_responses_that_do_not_match_are_refused(case, place, preparation):
    turns, message = WRONG[case]
    refused(place, preparation, {"messages": turns}, message)


def test_a_response_in_a_user_turn(make):
    make({"messages": [Q, called(1), said("user", "<tool_response>\nr\n</tool_response>"), A]})


# -- what a record says of its loss ----------------------------------------------------------------

TWO = [said("user", "Q"), said("assistant", "x"), said("user", "R"), said("assistant", "y")]


def masked(masks, name="loss_mask", turns=TWO):
    return [turn if mask is None else turn | {name: mask} for turn, mask in zip(turns, masks, strict=True)]


@pytest.mark.parametrize("name", ["loss_mask", "loss", "train", "trainable", "weight", "loss_scale"])
@pytest.mark.parametrize(
    ("masks", "trained"),
    [
        ([0, 0, 0, 1], ["y"]),
        ([None, False, None, True], ["y"]),
        ([0.0, 1.0, 0.0, 0.0], ["x"]),
        ([None, 1, None, None], ["x", "y"]),
        ([None, None, None, 0], ["x"]),
    ],
)
def test_turns_may_say_whether_they_are_trained(make, name, masks, trained):
    """Only the loss mask changes, not the text."""
    raw = {"messages": masked(masks, name)}
    assert make(raw, {"messages": TWO})[1] == [f"{text}{END}" for text in trained]


def test_a_record_may_have_a_loss_mask_for_all_turns(make):
    turns = [{"from": {"user": "human"}.get(t["role"], "gpt"), "value": t["content"]} for t in TWO]
    for masks, trained in (([0, 0, 0, 1], ["y"]), ([0, True, False, 0], ["x"]), ([0, 1, 0, 1], ["x", "y"])):
        assert make({"conversations": turns, "loss_mask": masks}, {"messages": TWO})[1] == [
            f"{t}{END}" for t in trained
        ]
    system = {"system": "S", "conversations": turns, "loss_mask": [0, 0, 0, 1]}  # one entry for each of the turns
    assert make(system, {"messages": [said("system", "S"), *TWO]})[1] == [f"y{END}"]


def test_both_settings_and_record_must_ask_for_training(place, make):
    first, last = {"messages": masked([None, 1, None, 0])}, {"messages": masked([None, 1, None, 1])}
    left_out = (
        f"1 answer is marked to be trained, but left out by mask_history: true; first: {place / 'r.json'}, record 1"
    )
    assert make(last, {"messages": TWO}, warned=[left_out], mask_history=True)[1] == [f"y{END}"]
    assert make(first, {"messages": TWO}, train_on_prompt=True)[1] == [f"Q{END}", f"x{END}", f"R{END}"]
    asked = {"messages": masked([0, 0, 1, 1])}
    assert make(asked, {"messages": TWO}, train_on_prompt=True)[1] == [f"R{END}", f"y{END}"]
    turns = [said("system", "S", loss=False), *TWO]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert make({"messages": turns, "tools": tools}, train_on_prompt=True)[1][0] == f"Q{END}"


def test_a_call_that_is_not_trained(make):
    turns = [Q, called(1, loss=False), said("tool", "r"), A]
    assert make({"messages": turns})[1] == [f"A{END}"]
    raw = share(
        ("human", "Q"), ("function_call", CALL_1), ("function_call", CALL_2), *[("observation", "r")] * 2, ("gpt", "A")
    )
    raw["loss_mask"] = [0, 0, 0, 0, 0, 1]
    assert make(raw, {"messages": [Q, called(1, 2), *[said("tool", "r")] * 2, A]})[1] == [f"A{END}"]


WRONG_MASKS = {
    "a factor": ({"messages": masked([None, 0.5, None, None], "loss_scale")}, r"\[1\]: loss_scale is 0\.5, neither 0 nor 1"),
    "a text": ({"messages": masked([None, "0", None, None])}, r"\[1\]: loss_mask is '0', neither 0 nor 1; a turn is trained"),
    "of tokens": ({"messages": masked([None, [0, 1], None, None])}, r"\[1\]: loss_mask is \[0, 1\], neither 0 nor 1"),
    "both": (
        {"messages": [Q, A | {"weight": 0, "loss": True}]}, r"\[1\]: loss and weight differ on whether it is trained; keep one",
    ),
    "the record's and the turn's": (
        {"messages": [Q, A | {"weight": 0}], "loss_mask": [0, 1]},
        r"\[1\]: weight and the record's loss_mask differ on whether",
    ),
    "too short": ({"messages": TWO, "loss_mask": [0, 1]}, r"has 4 turns, but the record's loss_mask has 2 entries"),
    "no list": ({"messages": TWO, "loss_mask": 1}, r"has 4 turns, but the record's loss_mask is a number"),
    "a factor in the list": ({"messages": TWO, "loss_mask": [0, 2, 0, 1]}, r"\[1\]: the record's loss_mask is 2, neither 0"),
    "the user's": (
        {"messages": masked([1, 1, 0, 1])}, r"turn 0 \(user\) is marked to be trained, but only answers are",
    ),
    "nothing": ({"messages": masked([0, 0, 0, 0])}, r"nothing in it is trained"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_MASKS)
def test_unclear_loss_masks_are_refused(case, place, preparation):
    raw, message = WRONG_MASKS[case]
    refused(place, preparation, raw, message)


@pytest.mark.parametrize("masks", [(None, 1), (1, None), (1, 1)])
def test_a_call_and_its_answer_share_their_loss(masks, make):
    """A turn without a mask counts as 1."""
    answer, call = {"role": "assistant", "content": "a"}, {"name": "f", "arguments": {}}
    turns = [answer | {"loss": masks[0]}, {"role": "tool_call", "content": json.dumps(call), "loss": masks[1]}]
    user = {"role": "user", "content": "Q"}
    meant = {"messages": [user, answer | {"tool_calls": [call]}]}
    _, trained = make({"messages": [user, *turns]}, meant)
    assert trained == ["a\n\n<tool_call>\n<function=f>\n</function>\n</tool_call><|im_end|>\n"]


# -- what is empty ---------------------------------------------------------------------------------

NOTHING = [
    {"images": []}, {"images": ""}, {"image": None}, {"videos": ""}, {"videos": []}, {"tools": ""}, {"tools": "[]"},
    {"tools": {}}, {"tools": "null"}, {"tools": None}, {"tools": []}, {"system": ""}, {"system": None}, {"conversations": []},
    {"loss_mask": None}, {"images": [], "image": ""}, {"objects": {"ref": [], "bbox": []}}, {"rejected": ""}, {"audios": []},
    {"label": None}, {"mystery": ""}, {"mystery": [{"x": None}]}, {"chosen": [], "rejected": None},
]  # fmt: skip


@pytest.mark.parametrize("fields", NOTHING, ids=json.dumps)
def test_empty_fields_of_a_record_are_ignored(make, fields):
    _, trained = make({"messages": [Q, A], **fields}, {"messages": [Q, A]})
    assert trained == [f"A{END}"]


EMPTY_IN_TURNS = [
    {"tool_calls": []}, {"tool_calls": None}, {"tool_calls": ""}, {"reasoning_content": ""}, {"reasoning_content": None},
    {"function_call": None}, {"function_call": {}}, {"weight": None}, {"name": ""}, {"refusal": None}, {"audio": None},
    {"tool_call_id": ""}, {"images": []}, {"mystery": None}, {"value": ""}, {"prefix": False},
]  # fmt: skip


@pytest.mark.parametrize("fields", EMPTY_IN_TURNS, ids=json.dumps)
def test_empty_fields_of_turns_are_ignored(make, fields):
    _, trained = make({"messages": [Q | fields, A | fields]}, {"messages": [Q, A]})
    assert trained == [f"A{END}"]


@pytest.mark.parametrize("content", [None, "", ..., [], [{"type": "text", "text": ""}]])
def test_no_content_beside_calls(make, content):
    calls = called(1, content=content)
    if content is ...:
        del calls["content"]
    _, trained = make({"messages": [Q, calls]}, {"messages": [Q, called(1)]})
    assert trained == [f"{written(1)}{END}"]


def test_an_empty_thought_beside_one_in_the_content(make):
    turns = [Q, said("assistant", "<think>\nwhy\n</think>\n\nA")]
    _, trained = make({"messages": [Q, turns[1] | {"reasoning_content": ""}]}, {"messages": turns})
    assert trained == [f"why\n</think>\n\nA{END}"]
