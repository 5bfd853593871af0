"""Each answer of a record stands behind the prompt that a server would write for it."""

import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings
from test_template import (
    DIALECT_FILES,
    STYLES,
    TEMPLATES,
    USER,
    conversations,
    expanded,
    extents,
    messages,
    quick,
    record,
    rendered,
    template_of,
    trained_text,
)
from tokenizer_fixture import PUBLISHED

from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data import conversations as module
from qwen35.data.chat_template import ChatTemplate
from qwen35.data.conversations import wanted_answers
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.image_processor import ImageProcessor
from qwen35.data.preparation import Preparation
from qwen35.data.record import RecordError, ToolCall
from qwen35.data.style import QWEN3_5, QWEN3_6, QWEN3_8, Style
from qwen35.data.template import (
    answer_text,
    as_trained,
    check_thoughts,
    is_query,
    render,
    split_thought,
    training_pieces,
    unprompted_answers,
)
from qwen35.data.tokenized import count_parts
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VideoProcessor

END = "<|im_end|>\n"
TALK = record(
    ("system", "S"),
    ("user", "a"),
    ("assistant", "A1", "r1"),
    ("user", "b"),
    ("assistant", "A2"),
    ("user", "c"),
    ("assistant", "A3", "r3"),
)


def split(r, style, joined=False, mask_history=False):
    return module.conversations(r, style, mask_history, joined)


def prompts_of(part, style, i):
    """What the published template writes before turn i, however a server may be asked."""
    asked = replace(part, turns=part.turns[:i])
    template = template_of(style, True)
    return [
        rendered(template, asked, add_generation_prompt=True, **style.given(choice) | {"enable_thinking": choice})
        for choice in style.choices
    ]


@settings(quick, max_examples=300)
@given(r=conversations(), style=STYLES)
def test_each_answer_is_trained_once_and_behind_its_prompt(r, style, tokenizer, hf_tokenizer):
    try:
        check_thoughts(r, style)
        r = as_trained(r, style)
        parts = split(r, style)
        pieces = [training_pieces(*part) for part in parts]
    except RecordError:
        return
    found = []
    for (part, own), whole in zip(parts, pieces, strict=True):
        assert render(whole) == rendered(template_of(style, True), part, **own.given(own.thinking))
        ids, trained = (values.tolist() for values in tokenizer.encode(whole, extents(whole, 2)))
        starts = [t for t in range(1, len(ids)) if trained[t] and not trained[t - 1]]
        for i in wanted_answers(part, mask_history=False):
            thought = split_thought(part, own, i)[0]
            prompts = [
                hf_tokenizer(expanded(p, 2), add_special_tokens=False).input_ids for p in prompts_of(part, own, i)
            ]
            begins = [len(p) for p in prompts if len(p) in starts and ids[: len(p)] == p]
            if not begins:  # told, see unprompted_answers
                assert style.enable_thinking and not thought and i + 1 < len(part.turns), (ids, prompts, starts)
                continue
            found.append(i)
            end = next((t for t in range(begins[0], len(ids)) if not trained[t]), len(ids))
            answer = split_thought(part, own, i)[1] + answer_text(replace(part.turns[i], content=""), own)
            said = tokenizer.decode(ids[begins[0] : end])
            assert said.endswith(END) and (not thought or said.replace("\n", "").startswith(composed(thought)))
            assert ("</think>" in said) == bool(
                thought or (own.effort(own.thinking is not False) and style.enable_thinking)
            )
            assert composed(answer) in said.replace("\n", "")
        assert len(starts) == len(wanted_answers(part, False)) - unprompted_answers(part, own)
    first = next(i for i, turn in enumerate(r.turns) if is_query(turn))
    missing = sum(unprompted_answers(*part) for part in parts)
    assert sorted(found) == sorted(set(found)) and not [i for i in found if i < first]
    assert len(found) + missing == sum(i > first for i in wanted_answers(r, mask_history=False))


def composed(text):
    """As the tokenizer writes it, but without line breaks, which templates change at the edges."""
    return unicodedata.normalize("NFC", text).replace("\n", "")


def texts(parts, tokenizer):
    return [trained_text(tokenizer, training_pieces(*part)) for part in parts]


@pytest.mark.parametrize("dialect", [QWEN3_5, QWEN3_6])
def test_a_sample_for_each_question(dialect, tokenizer):
    parts = split(TALK, Style(dialect=dialect))
    first, second, third = (len(part.turns) for part, _ in parts)
    assert (first, second, third) == (3, 5, 7)
    assert texts(parts, tokenizer) == [[f"r1\n</think>\n\nA1{END}"], [f"A2{END}"], [f"r3\n</think>\n\nA3{END}"]]
    assert [part.source for part, _ in parts] == [f"x.json, record 1, part {n} of 3" for n in (1, 2, 3)]
    ((whole, _),) = split(TALK, Style(dialect=dialect), joined=True)
    assert whole.turns == TALK.turns
    assert texts([(whole, Style())], tokenizer) == [[f"A1{END}", f"A2{END}", f"r3\n</think>\n\nA3{END}"]]


def test_a_template_that_keeps_thoughts_needs_no_split(tokenizer):
    ((part, _),) = split(TALK, Style(dialect=QWEN3_6, preserve_thinking=True))
    assert part == TALK
    assert len(split(TALK, Style("qwen3_vl_nothink"))) == 1


def test_answers_with_and_without_a_thought_are_asked_for_differently(tokenizer):
    """Qwen3.8's text opens with a sentence on thinking where the server asks for it."""
    (plain, not_asked), (thinking, asked) = split(TALK, Style(dialect=QWEN3_8))
    assert (not_asked.thinking, asked.thinking) == (False, True)
    assert "Reasoning effort" in render(training_pieces(thinking, asked))
    assert "Reasoning effort" not in render(training_pieces(plain, not_asked))
    assert "r1" in render(training_pieces(plain, not_asked))  # the thoughts of the history stay
    trained = [[f"A2{END}"], [f"r1\n</think>\n\nA1{END}", f"r3\n</think>\n\nA3{END}"]]
    assert texts([(plain, not_asked), (thinking, asked)], tokenizer) == trained


def test_what_is_not_to_be_trained_makes_no_sample(tokenizer):
    style = Style(dialect=QWEN3_5)
    assert texts(split(TALK, style, mask_history=True), tokenizer) == [[f"r3\n</think>\n\nA3{END}"]]
    turns = list(TALK.turns)
    turns[2] = replace(turns[2], loss=False)
    ((two, _), (three, _)) = split(replace(TALK, turns=tuple(turns)), style)
    assert (len(two.turns), len(three.turns)) == (5, 7)
    unanswered = replace(TALK, turns=tuple(replace(turn, loss=False) for turn in turns))
    assert split(unanswered, style) == [(unanswered, style)]


def test_questions_are_trained_once(tokenizer):
    """With train_on_prompt, the turns before a part's own are history to it."""
    pieces = [training_pieces(part, style, train_on_prompt=True) for part, style in split(TALK, Style())]
    assert [trained_text(tokenizer, p) for p in pieces] == [
        [f"S{END}", f"a{END}", f"r1\n</think>\n\nA1{END}"],
        [f"b{END}", f"A2{END}"],
        [f"c{END}", f"r3\n</think>\n\nA3{END}"],
    ]


def test_more_questions_than_can_be_split_are_refused():
    turns = [turn for _ in range(300) for turn in (USER, ("assistant", "A"))]
    with pytest.raises(RecordError, match=r"record 1: its 300 questions are 90,300 turns, .* multi_turn: joined"):
        split(record(*turns), Style())
    assert len(split(record(*turns), Style(), joined=True)) == len(split(record(*turns), Style(dialect=QWEN3_8))) == 1
    assert len(split(record(*turns[:400]), Style())) == 200


def test_calls_and_their_results_stay_with_their_question(tokenizer):
    call = ("assistant", "", "need f", (ToolCall("f", {"a": 1}),))
    r = record(USER, call, ("tool", "4"), ("assistant", "four", "so"), USER, call, ("tool", "5"), ("assistant", "five"))
    parts = split(r, Style())
    assert [len(part.turns) for part, _ in parts] == [4, 8]
    assert [[text[:6] for text in part] for part in texts(parts, tokenizer)] == [
        ["need f", "so\n</t"],
        ["need f", "five<|"],
    ]


def test_an_answer_before_any_question_is_not_trained(folder):
    r = record(("user", "<tool_response>1</tool_response>"), ("assistant", "A"), ("user", "b"), ("assistant", "B"))
    p = preparation(folder)
    ((part, sample),) = p.tokenise(r)
    assert sample.loss_mask.sum() == len(p.tokenizer.encode_text("B")) + 2 and len(part.turns) == 4
    warnings = DataWarnings()
    count_parts(warnings, r, [(part, sample)], p)
    assert warnings.counts == {"unseen": {"": (1, "x.json, record 1")}}


def preparation(folder, style=None, template=None, **basic):
    limits, own = PreprocessParameters(), BasicParameters("x", **basic)
    images = ImageProcessor.from_folder(folder, limits.image_min_pixels, limits.image_max_pixels)
    videos = VideoProcessor.from_folder(folder, limits)
    return Preparation(ChatTokenizer(folder), images, own, Attr(), videos, style or Style(), template)


@pytest.mark.parametrize("dialect", DIALECT_FILES)
@pytest.mark.parametrize("multi_turn", ["split", "joined"])
def test_template_checkpoint_makes_the_same_samples(dialect, multi_turn, folder):
    """But for answers that it cannot train as history, which it counts."""
    own = preparation(folder, Style(dialect=dialect), multi_turn=multi_turn).tokenise(TALK)
    template = ChatTemplate((PUBLISHED / DIALECT_FILES[dialect]).read_text(), "chat_template.jinja")
    p = preparation(folder, Style("checkpoint", dialect), template, multi_turn=multi_turn)
    parts = p.tokenise(TALK)
    assert [sample.ids.tolist() for _, sample in parts] == [sample.ids.tolist() for _, sample in own]
    warnings = DataWarnings()
    count_parts(warnings, TALK, parts, p)
    history = multi_turn == "joined" and not dialect.keeps_thoughts
    assert {kind: found[""][0] for kind, found in warnings.counts.items()} == (
        {"unseen": 2, "thoughts": 1} if history else {"split": 1}
    )
    if not history:
        assert [s.loss_mask.tolist() for _, s in parts] == [s.loss_mask.tolist() for _, s in own]


def test_several_think_blocks_are_refused_before_thoughts_are_dropped(folder):
    r = record(USER, ("assistant", "<think>a</think>b<think>c</think>d"))
    for template, style in (
        ("qwen3_5", Style(enable_thinking=False)),
        ("checkpoint", Style("checkpoint", enable_thinking=False)),
    ):
        found = ChatTemplate((PUBLISHED / "chat_template.jinja").read_text(), "x") if template == "checkpoint" else None
        with pytest.raises(RecordError, match="several think blocks"):
            preparation(folder, style, found).tokenise(r)


def test_messages_render_the_same_way():
    """The references above are the published templates' own text."""
    assert "<think>\nr3" in TEMPLATES[True].render(messages=messages(TALK))


def test_a_record_whose_only_trained_answer_has_no_question_is_refused(folder):
    """A tool response that a user turn spells out is none."""
    spelled = record(
        ("user", "<tool_response>x</tool_response>"), ("assistant", "A1"), ("user", "b"), ("assistant", "A2")
    )
    turns = (*spelled.turns[:3], replace(spelled.turns[3], loss=False))
    with pytest.raises(RecordError, match="nothing in it is trained"):
        preparation(folder).tokenise(replace(spelled, turns=turns))


def test_special_tokens_of_earlier_answers_are_tokens_as_where_they_were_trained(folder):
    """Or they are refused: a foreign template does not show which of its words are an answer's."""
    boxes = record(("user", "a"), ("assistant", "<|box_start|>1"), ("user", "b"), ("assistant", "<|box_start|>2"))
    published = ChatTemplate((PUBLISHED / DIALECT_FILES[QWEN3_5]).read_text(), "chat_template.jinja")
    own = replace(preparation(folder), tokenizer=ChatTokenizer(folder, "text"))
    foreign = replace(own, style=Style("checkpoint"), chat_template=published)
    parts = [
        replace(p, basic=replace(p.basic, special_tokens_in_prompts=how), tokenizer=ChatTokenizer(folder, how))
        for p, how in ((own, "text"), (own, "tokens"), (foreign, "tokens"))
    ]
    first, *others = ([sample.ids.tolist() for _, sample in p.tokenise(boxes)] for p in parts)
    assert all(ids == first for ids in others)
    refused = replace(foreign, basic=replace(foreign.basic, special_tokens_in_prompts="text"))
    for make in (refused.tokenise, lambda r: refused.prompt(r, False)):
        with pytest.raises(RecordError, match=r"an earlier answer spells <\|box_start\|>.*; set it to tokens"):
            make(boxes)
    assert len(refused.tokenise(replace(boxes, turns=boxes.turns[:2]))) == 1
