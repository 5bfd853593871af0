"""Records that a model folder's chat template writes differently, for all published templates."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from tokenizer_fixture import PUBLISHED, make_model_folder
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from qwen35.config.load import SettingError
from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data import style as styles
from qwen35.data.chat_template import ChatTemplate
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.image_processor import ImageProcessor
from qwen35.data.preparation import Preparation, reference_template
from qwen35.data.record import Record, RecordError, ToolCall, Turn
from qwen35.data.style import Style, style_of
from qwen35.data.template import as_trained, prompt_pieces, render, training_pieces
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VideoProcessor

QWEN3_5 = ("chat_template.jinja", "chat_template_nothink.jinja")
QWEN3_6, QWEN3_8 = "chat_template_qwen3_6.jinja", "chat_template_qwen3_8.jinja"
NAMES = dict.fromkeys(QWEN3_5, styles.QWEN3_5) | {QWEN3_6: styles.QWEN3_6, QWEN3_8: styles.QWEN3_8}
ASK, SAY, NEXT = Turn("user", "Hi"), Turn("assistant", "Yo"), Turn("user", "And?")
THINK = Turn("assistant", "Yo", "because")
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {}}},)


def call(**arguments):
    return Turn("assistant", "", None, (ToolCall("f", arguments),))


RECORDS = {
    "one turn": ((ASK, SAY), ()),
    "a thought": ((ASK, THINK), ()),
    "a thought in the content": ((ASK, replace(SAY, content="<think>\nso\n</think>\n\nYo")), ()),
    "a system": ((Turn("system", "Be kind."), ASK, SAY), ()),
    "an empty system": ((Turn("system", ""), ASK, SAY), ()),
    "a history": ((ASK, SAY, NEXT, SAY), ()),
    "a history with thoughts": ((ASK, THINK, NEXT, THINK), ()),
    "an image": ((Turn("user", (Path("a.jpg"), "What?")), SAY), ()),
    "tools": ((ASK, call(a="s", b=[1], c={"d": "é"}), Turn("tool", "4"), SAY), TOOLS),
    "a call with true": ((ASK, call(a=True), Turn("tool", "4"), SAY), TOOLS),
    "a call with null": ((ASK, call(a=None), Turn("tool", "4"), SAY), TOOLS),
    "a call with a number": ((ASK, call(a=1.5), Turn("tool", "4"), SAY), TOOLS),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def folder_with(model, tmp_path):
    return partial(_folder_with, shutil.copytree(model, tmp_path / "model"))


def _folder_with(folder, name):
    shutil.copy(PUBLISHED / name, folder / "chat_template.jinja")
    return folder


def messages(turns):
    out = []
    for turn in turns:
        parts = turn.content
        if not isinstance(parts, str):
            parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
        calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in turn.tool_calls]
        more = {"tool_calls": calls} if calls else {}
        more |= {} if turn.reasoning is None else {"reasoning_content": turn.reasoning}
        out.append({"role": turn.role, "content": parts} | more)
    return out


def transformers_text(folder, turns, tools, **given):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    template = tokenizer.get_chat_template()
    rendered = render_jinja_template([messages(turns)], tools=list(tools) or None, chat_template=template, **given)
    return rendered[0][0]


def own(name):
    """A folder's own template that differs from a published one by a comment, so it is compared."""
    return "{#- ours #}" + (PUBLISHED / name).read_text()


STYLES = {
    name: [Style(dialect=dialect, enable_thinking=t) for t in (None, True, False)] for name, dialect in NAMES.items()
}


@pytest.mark.parametrize(("name", "style"), [(name, style) for name in STYLES for style in STYLES[name]])
def test_a_record_is_written_as_transformers_writes_it(folder_with, name, style):
    """By every published template, and by a copy of it that nobody knows."""
    folder = folder_with(name)
    assert (
        ChatTemplate.from_folder(folder).is_published
        and style_of(folder, BasicParameters("x")).dialect is style.dialect
    )
    (folder / "chat_template.jinja").write_text(own(name))
    template = ChatTemplate.from_folder(folder)
    for what, (turns, tools) in RECORDS.items():
        record = as_trained(Record("x.json, record 1", turns, tools), style)
        text = transformers_text(folder, record.turns, tools, **style.given(style.enable_thinking))
        assert render(training_pieces(record, style)) == text, what
        template.check_training(record, style)
        for thinking in (True, False):
            given = {"add_generation_prompt": True} | style.given(thinking)
            text = transformers_text(folder, record.turns[:-1], tools, **given)
            assert render(prompt_pieces(record, style, thinking)) == text, what
            template.check_prompt(record, style, thinking)


@pytest.mark.parametrize("name", [QWEN3_6, QWEN3_8])
def test_a_record_is_refused_exactly_where_the_template_writes_different_text(folder_with, name):
    """Qwen3.5's text beside newer templates."""
    folder, style, refused = folder_with(name), Style(), set()
    (folder / "chat_template.jinja").write_text(own(name))
    template = ChatTemplate.from_folder(folder)
    for what, (turns, tools) in RECORDS.items():
        record = Record("x.json, record 1", turns, tools)
        if transformers_text(folder, turns, tools) == render(training_pieces(record, style)):
            template.check_training(record, style)
            continue
        refused.add(what)
        with pytest.raises(
            RecordError, match=r"^x\.json, record 1: .*chat_template\.jinja, .* which this follows, writes "
        ):
            template.check_training(record, style)
    assert refused == ({"a call with true", "a call with null"} if name == QWEN3_6 else RECORDS.keys())


def preparation(folder, template="qwen3_5"):
    limits, basic = PreprocessParameters(), BasicParameters("x", template=template)
    images = ImageProcessor.from_folder(folder, limits.image_min_pixels, limits.image_max_pixels)
    videos = VideoProcessor.from_folder(folder, limits)
    return Preparation(
        ChatTokenizer(folder), images, basic, Attr(), videos, style_of(folder, basic), reference_template(folder, basic)
    )


def test_training_and_inference_both_compare_the_template(folder_with):
    folder = folder_with(QWEN3_8)
    record = Record("x.json, record 1", (ASK, THINK))
    spec = vision_spec(folder)
    assert "Reasoning effort is set to xhigh" in ChatTokenizer(folder).decode(
        preparation(folder).tokenise(record)[0][1].ids.tolist()
    )
    text = own(QWEN3_8).replace("Reasoning effort is set to xhigh.", "Think hard.")
    (folder / "chat_template.jinja").write_text(text)
    with pytest.raises(RecordError, match="Think hard"):
        preparation(folder).tokenise(record)
    with pytest.raises(RecordError, match="Think hard"):
        prompt_batch(record, preparation(folder), spec, thinking=True)
    prompt_batch(record, preparation(folder), spec, thinking=False)
    assert preparation(folder, "qwen3_vl_nothink").tokenise(record)  # the recipe asks for a text of its own
    keys = {preparation(folder_with(name)).cache_key(PUBLISHED / "README.md", None) for name in NAMES}
    assert len(keys) == len({dialect.name for dialect in NAMES.values()})


def test_a_custom_template_is_compared(folder_with):
    folder = folder_with(QWEN3_5[0])
    own, text = folder / "chat_template.jinja", (PUBLISHED / QWEN3_5[0]).read_text()
    record = Record("x.json, record 1", (ASK, SAY))
    own.write_text(text + "\n")  # Jinja drops it
    assert ChatTemplate.from_folder(folder).is_published
    own.write_text("{%- set a = 1 %}" + text + "{% generation %}{% endgeneration %}")
    ChatTemplate.from_folder(folder).check_training(record, Style())
    own.write_text("You are a pirate." + text)
    with pytest.raises(RecordError, match=r"writes 'You are a pirate\..* at character 0, .* writes '<\|im_start"):
        ChatTemplate.from_folder(folder).check_training(record, Style())
    own.write_text("{{ raise_exception('no ' + messages[0].role) }}")
    with pytest.raises(RecordError, match="cannot render it: no user"):
        ChatTemplate.from_folder(folder).check_training(record, Style())
    own.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RecordError, match=r"cannot render it: .*unsafe"):
        ChatTemplate.from_folder(folder).check_training(record, Style())
    own.write_text("{% if %}")
    with pytest.raises(SettingError, match=r"chat_template\.jinja: is not a chat template: "):
        ChatTemplate.from_folder(folder)


def test_the_template_is_found_wherever_a_folder_keeps_it(folder_with):
    folder = folder_with(QWEN3_6)
    (folder / "chat_template.jinja").write_text(own(QWEN3_6))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "older"}))
    assert ChatTemplate.from_folder(folder).text == own(QWEN3_6)
    assert PreTrainedTokenizerFast.from_pretrained(folder).chat_template == own(QWEN3_6)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "another"}))
    with pytest.raises(
        SettingError, match=r"chat_template\.json and chat_template\.jinja hold different chat templates"
    ):
        ChatTemplate.from_folder(folder)
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").unlink()
    assert ChatTemplate.from_folder(folder).text == "older"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    with pytest.raises(SettingError, match="has several chat templates; keep one"):
        ChatTemplate.from_folder(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_folder(folder) is None
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("b")
    with pytest.raises(SettingError, match="has several chat templates; keep one"):
        ChatTemplate.from_folder(folder)


def test_a_template_can_name_the_tokens_that_transformers_gives_it(folder_with):
    """Many end an answer with eos_token, which would be nothing if it were not given."""
    folder = folder_with("chat_template.jinja")
    text = (
        "{{ bos_token }}{% if documents is defined %}D{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% else %}<|im_end|>{% endif %}\n{% endfor %}"
        "{{ pad_token }}{{ unk_token }}{{ sep_token }}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    if Version(transformers.__version__) < Version("5.20"):  # in which this tokenizer has an unk_token of its own
        text = text.replace("{{ unk_token }}", "")
    (folder / "chat_template.jinja").write_text(text)
    record = Record("x", (ASK, SAY))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for named in (config, config | {"eos_token": "<|endoftext|>", "sep_token": "<|box_end|>"}, {}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen3_5Tokenizer"} | named))
        theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages(record.turns), tokenize=False)
        assert ChatTemplate.from_folder(folder).render(record, record.turns, {}) == theirs
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    basic = BasicParameters("x", template="checkpoint")
    (folder / "chat_template.jinja").write_text(text.replace("{{ pad_token }}", "").replace("{{ unk_token }}", ""))
    images, videos = (
        ImageProcessor.from_folder(folder, 1024, 4096),
        VideoProcessor.from_folder(folder, PreprocessParameters()),
    )
    parts = (
        ChatTokenizer(folder),
        images,
        basic,
        Attr(),
        videos,
        style_of(folder, basic),
        reference_template(folder, basic),
    )
    ((_, sample),) = Preparation(*parts).tokenise(record)
    assert parts[0].decode(sample.ids[sample.loss_mask].tolist()) == "Yo<|im_end|>"
