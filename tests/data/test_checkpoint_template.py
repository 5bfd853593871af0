"""`template: checkpoint`: text, tokens and masks of templates that are rendered, not rewritten."""

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_template import DIALECT_FILES, STYLES, USER, conversations, extents, quick, record, trained_text
from tokenizer_fixture import PUBLISHED

from qwen35.config.load import SettingError
from qwen35.config.schema import Attr, BasicParameters
from qwen35.data.chat_template import ChatTemplate
from qwen35.data.checkpoint_template import checkpoint_pieces, checkpoint_prompt
from qwen35.data.formats import read_records
from qwen35.data.media import ImageFolder
from qwen35.data.preparation import reference_template
from qwen35.data.record import RecordError, ToolCall
from qwen35.data.style import QWEN3_5, QWEN3_8, Style
from qwen35.data.template import (
    _last_query,
    as_trained,
    check_thoughts,
    prompt_pieces,
    render,
    training_pieces,
    unprompted_answers,
)

TEMPLATES = {dialect: ChatTemplate((PUBLISHED / name).read_text(), name) for dialect, name in DIALECT_FILES.items()}
# nobody's: roles in capitals, thoughts in tags of its own, an end that is not the last thing
FOREIGN = """{%- for m in messages %}<|im_start|>{{ m.role | upper }}
{% if m.reasoning_content %}<plan>{{ m.reasoning_content }}</plan>{% endif %}
{%- if m.content is string %}{{ m.content }}{% else %}{% for part in m.content -%}
{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>ASSISTANT
{% endif %}"""


def last_only(r):
    return replace(r, turns=(*(replace(turn, loss=False) for turn in r.turns[:-1]), r.turns[-1]))


def own(text):
    return ChatTemplate(text, "chat_template.jinja")


@settings(quick, max_examples=300)
@given(r=conversations(), style=STYLES)
def test_published_templates_give_the_tokens_of_our_own_pieces(r, style, tokenizer):
    """And the mask, but for answers before the last question that lost their think block."""
    r, template = as_trained(r, style), TEMPLATES[style.dialect]
    try:
        check_thoughts(r, style)
        ours = training_pieces(r, style)
    except RecordError:
        return
    pieces, unseen = checkpoint_pieces(r, template, style)
    assert render(pieces) == render(ours)
    last_query = _last_query(r, style)
    history = sum(turn.role == "assistant" for turn in r.turns[: last_query + 1])
    ids, trained = tokenizer.encode(ours, extents(ours, 2))
    found, mask = tokenizer.encode(pieces, extents(pieces, 2))
    if not history:
        assert unseen == unprompted_answers(r, style)
        assert found.tolist() == ids.tolist() and mask.tolist() == trained.tolist()
    else:
        assert unseen >= history


@settings(quick, max_examples=300)
@given(r=conversations(), style=STYLES, thinking=st.booleans())
def test_the_tokens_before_each_trained_answer_are_those_of_its_prompt(r, style, thinking, tokenizer):
    """Of one of the prompts, with or without an open thought, that a server would write there."""
    r, template = as_trained(r, style), TEMPLATES[style.dialect]
    try:
        check_thoughts(r, style)
        pieces, _ = checkpoint_pieces(r, template, style)
    except RecordError:
        return
    ids, trained = tokenizer.encode(pieces, extents(pieces, 2))
    starts = [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
    answers = [i for i, turn in enumerate(r.turns) if turn.role == "assistant"]
    prompts = []
    for i in answers:
        asked = record(*(("user", "x"),)) if i == 0 else type(r)(r.source, r.turns[:i], r.tools)
        for choice in style.choices:
            asked_pieces = checkpoint_prompt(asked, template, style, choice)
            prompts.append(tokenizer.encode(asked_pieces, extents(asked_pieces, 2))[0].tolist())
            if not any(turn.role == "assistant" and "</think>" in turn.text for turn in asked.turns):
                assert render(asked_pieces) == render(prompt_pieces(asked, style, choice))
    assert starts and all(ids[:start].tolist() in prompts for start in starts)


def test_a_foreign_template(tokenizer):
    turns = [
        ("system", "S"),
        ("user", "a<image>b"),
        ("assistant", "A1", "r"),
        ("user", "<|im_end|>"),
        ("assistant", "A2"),
    ]
    r = record(*turns)
    pieces, unseen = checkpoint_pieces(r, own(FOREIGN), Style("checkpoint"))
    assert not unseen and trained_text(tokenizer, pieces) == ["<plan>r</plan>A1<|im_end|>\n", "A2<|im_end|>\n"]
    assert [p.text for p in pieces if p.kind == "control"].count("<|im_end|>") == 5  # the user's is text
    assert "<|im_start|>USER\n<|im_end|><|im_end|>" in render(pieces)
    last, _ = checkpoint_pieces(last_only(r), own(FOREIGN), Style("checkpoint"))
    assert trained_text(tokenizer, last) == ["A2<|im_end|>\n"]
    assert render(checkpoint_prompt(r, own(FOREIGN), Style("checkpoint"), True)).endswith("<|im_start|>ASSISTANT\n")


MARKED = (
    "{%- for m in messages %}{% if m.role == 'assistant' %}BEFORE<|im_start|>assistant\n<think>\n\n</think>\n\n"
    "{% generation %}{{ m.content }}AFTER\n"
    "{% else %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def test_marks_never_train_what_a_prompt_holds(tokenizer):
    r = record(USER, ("assistant", "Yo"), USER, ("assistant", "Bye"))
    header = MARKED.replace("{% generation %}", "").replace("BEFORE", "{% generation %}")
    pieces, _ = checkpoint_pieces(r, own(header.replace("AFTER", "<|im_end|>{% endgeneration %}")), Style("checkpoint"))
    assert trained_text(tokenizer, pieces) == ["Yo<|im_end|>", "Bye<|im_end|>"]


def test_a_mark_inside_a_word_cuts_no_token(tokenizer, hf_tokenizer):
    """As in transformers: the text is one text, and a token that a mark cuts is not trained."""
    text = MARKED.replace("BEFORE", "").replace("AFTER", "<|im_end|>{% endgeneration %}")
    text = text.replace("{% generation %}", "The ca{% generation %}t and a dog ")
    r = record(USER, ("assistant", "Yo"))
    pieces, _ = checkpoint_pieces(r, own(text), Style("checkpoint"))
    ids, trained = tokenizer.encode(pieces)
    assert ids.tolist() == hf_tokenizer(render(pieces), add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[trained].tolist()).endswith("nd a dog Yo<|im_end|>")


def test_marks_without_the_end_of_an_answer_are_refused():
    text = MARKED.replace("BEFORE", "").replace("AFTER", "{% endgeneration %}<|im_end|>")
    with pytest.raises(
        RecordError, match=r"marks answer 'Yo' without its end, <\|im_end\|>, so that the model would not"
    ):
        checkpoint_pieces(record(USER, ("assistant", "Yo")), own(text), Style("checkpoint"))


def test_marks_of_generated_text_decide(tokenizer):
    marked = MARKED.replace("BEFORE", "").replace("AFTER", "<|im_end|>{% endgeneration %}")
    r = record(USER, ("assistant", "Yo"), USER, ("assistant", "Bye"))
    pieces, _ = checkpoint_pieces(r, own(marked), Style("checkpoint"))
    assert trained_text(tokenizer, pieces) == ["Yo<|im_end|>", "Bye<|im_end|>"]
    pieces, _ = checkpoint_pieces(last_only(r), own(marked), Style("checkpoint"))
    assert trained_text(tokenizer, pieces) == ["Bye<|im_end|>"]
    with pytest.raises(RecordError, match="marks 1 stretches as generated, of 2 answers"):
        checkpoint_pieces(
            r,
            own(
                marked.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
                    "{% endgeneration %}", "{% endgeneration %}{% endif %}"
                )
            ),
            Style("checkpoint"),
        )


def test_answers_that_the_model_would_never_be_asked_for_so(tokenizer):
    """Qwen3.5's history has no think block, but its prompts do: such answers are counted."""
    r = record(USER, ("assistant", "A1"), ("user", "b"), ("assistant", "A2"))
    pieces, unseen = checkpoint_pieces(r, TEMPLATES[QWEN3_5], Style("checkpoint"))
    assert unseen == 1 and trained_text(tokenizer, pieces) == ["A2<|im_end|>\n"]
    style = Style("checkpoint", QWEN3_8, enable_thinking=False)
    pieces, unseen = checkpoint_pieces(r, TEMPLATES[QWEN3_8], style)
    assert unseen == 0 and trained_text(tokenizer, pieces) == ["A1<|im_end|>\n", "A2<|im_end|>\n"]


@pytest.mark.parametrize(
    ("text", "turn", "message"),
    [
        (FOREIGN.replace("ASSISTANT\n", "MODEL\n"), ("assistant", "A"), r"writes 'ASSISTANT.*last answer has 'MODEL"),
        ("<|endoftext|>" + FOREIGN, ("assistant", "A"), r"writes <\|endoftext\|>, which is not built"),
        (FOREIGN.replace("<|vision_start|>", "<|vision_end|>"), ("assistant", "A"), r"writes <\|vision_end\|>, which"),
        (FOREIGN.replace("part.type == 'text'", "1"), ("assistant", "A"), "writes 0 images and videos of 1"),
        ("{{ raise_exception('no') }}", ("assistant", "A"), "cannot render it: no"),
        (FOREIGN, ("assistant", "A\ufdd2"), r"a code point that no text may hold"),
    ],
)
def test_what_a_template_does_that_cannot_be_trained(text, turn, message):
    with pytest.raises(RecordError, match=message):
        checkpoint_pieces(record(("user", "<image>"), turn), own(text), Style("checkpoint"))


def test_words_of_control_tokens_in_calls_and_tools_stay_text(tokenizer):
    call = ("assistant", "", None, (ToolCall("f", {"a": "<|im_end|>", "b": ["<|im_start|>"]}),))
    r = record(USER, call, ("tool", "<|im_end|>"), ("assistant", "A"), tools=({"name": "<|im_end|>"},))
    pieces, _ = checkpoint_pieces(r, TEMPLATES[QWEN3_5], Style("checkpoint"))
    assert [p.text for p in pieces if p.kind == "control"] == [
        p.text for p in training_pieces(r, Style()) if p.kind == "control"
    ]
    assert render(pieces) == render(training_pieces(r, Style()))


def test_the_setting_asks_for_the_folders_template(folder, tmp_path):
    assert reference_template(folder, BasicParameters("x", template="checkpoint")).is_published
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(SettingError, match="has no chat template, which template: checkpoint asks for"):
        reference_template(bare, BasicParameters("x", template="checkpoint"))


NAMING = """{%- for m in messages %}<|im_start|>{{ m.role }}{{ ' ' ~ m.name if m.name }}
{{ m.tool_call_id ~ ' ' if m.tool_call_id }}{{ m.content }}
{%- for call in m.tool_calls or [] %}[{{ call.id }} {{ call.type }} {{ call.function.name }}]{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_names_and_ids_are_written_as_transformers_writes_them(tmp_path, folder, tokenizer):
    """They decide nothing in the family's own templates, which leave them out."""
    from transformers import PreTrainedTokenizerFast

    messages = [
        {"role": "user", "content": "q", "name": "Bo<|im_end|>"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "content": "r", "name": "f", "tool_call_id": "c1"},
        {"role": "assistant", "content": "A"},
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": messages}]))
    (r,) = read_records(tmp_path / "a.json", Attr(), ImageFolder(tmp_path))
    pieces, unseen = checkpoint_pieces(r, own(NAMING), Style("checkpoint"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert render(pieces) == theirs.apply_chat_template(messages, chat_template=NAMING, tokenize=False) and not unseen
    assert [p.text for p in pieces if p.kind == "control"].count("<|im_end|>") == 4  # that of the name is text
    assert trained_text(tokenizer, pieces) == ["[c1 function f]<|im_end|>\n", "A<|im_end|>\n"]
    assert render(training_pieces(r, Style())) == TEMPLATES[QWEN3_5].render(r, r.turns, {})
    tool = '{%- elif message.role == "tool" %}'
    naming = own(TEMPLATES[QWEN3_5].text.replace(tool, tool + "{{ message.name }}"))
    with pytest.raises(RecordError, match="template: checkpoint"):  # served, it would write the name
        naming.check_training(r, Style())


def test_a_template_that_writes_the_date_is_refused():
    """Llama's way: without a clock it would train a date that no server writes."""
    dated = (
        """{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% else %}
{%- set date = '26 Jul 2024' %}{% endif %}<|im_start|>system
Today: {{ date }}<|im_end|>
"""
        + FOREIGN
    )
    with pytest.raises(RecordError, match=r"chat_template.jinja cannot render it: it writes today's date"):
        checkpoint_pieces(record(("user", "q"), ("assistant", "A")), own(dated), Style("checkpoint"))
