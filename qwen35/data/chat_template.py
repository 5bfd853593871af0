"""Compares the chat template of a model folder with the text that is trained.

Servers prompt a model through its own template, so a record that this template would write
differently is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen35.data.files import read_chat_template
from qwen35.data.record import Record, ToolCall, Turn, Video
from qwen35.data.style import DIALECTS, Style, digest_of
from qwen35.data.template import as_asked, as_trained, prompt_pieces, render, training_pieces
from qwen35.data.tokenizer import named_tokens
from qwen35.errors import SettingError, one_line

# What a foreign template may raise on values that it does not expect.
RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
MARKS = ("\ufdd0", "\ufdd1")  # code points that Unicode keeps free for programs' own use
TOKENIZER_CONFIG = "tokenizer_config.json"
SHOWN = 60  # characters of each text from the first difference on


@dataclass(frozen=True)
class ChatTemplate:
    text: str
    file: str
    tokens: Mapping[str, str] = field(default_factory=dict)  # that it can name: eos_token, …

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate | None":
        """None if a model folder has none. Raises SettingError."""
        found = read_chat_template(folder)
        if found is None:
            return None
        has_tokens = (Path(folder) / TOKENIZER_CONFIG).is_file()
        template = cls(*found, named_tokens(folder) if has_tokens else {})
        try:
            _compiled(template.text)
        except jinja2.TemplateError as error:
            raise SettingError(f"{template.file}: is not a chat template: {one_line(error)}") from None
        return template

    @property
    def is_published(self) -> bool:
        """Whether template.py reproduces it for every record, as its tests prove."""
        return any(digest_of(self.text) in dialect.digests for dialect in DIALECTS)

    def render(self, record: Record, turns: Sequence[Turn], given: Mapping[str, Any], marks: bool = False) -> str:
        """Turns of a record as the template writes them; marks: with MARKS around generated text.

        Raises RecordError.
        """
        messages, tools = [_message(turn) for turn in turns], list(record.tools) or None
        try:
            values = {"documents": None, "add_generation_prompt": False, **self.tokens, **given}
            text = _compiled(self.text).render(messages=messages, tools=tools, **values)
        except RENDER_ERRORS as error:
            raise record.error(f"{self.file} cannot render it: {one_line(error)}", "chat template differs") from None
        return text if marks else re.sub(f"[{''.join(MARKS)}]", "", text)

    def check_training(self, record: Record, style: Style) -> None:
        """Raises RecordError if the template writes a conversation unlike training_pieces."""
        turns = as_trained(record, style).turns
        own = self.render(record, turns, style.given(style.thinking))
        self._compare(record, own, render(training_pieces(record, style)), style)

    def check_prompt(self, record: Record, style: Style, thinking: bool) -> None:
        """Raises RecordError if the template writes a prompt unlike prompt_pieces."""
        turns = as_asked(as_trained(record, style))
        own = self.render(record, turns, {"add_generation_prompt": True} | style.given(thinking))
        self._compare(record, own, render(prompt_pieces(record, style, thinking)), style)

    def _compare(self, record: Record, own: str, ours: str, style: Style) -> None:
        if own != ours:
            at = first_difference(own, ours)
            raise record.error(
                f"{self.file}, which prompts the model when it is served, writes {own[at : at + SHOWN]!r} at character {at}, "
                f"where {style.dialect.name}'s, which this follows, writes {ours[at : at + SHOWN]!r}; template: checkpoint "
                "trains what the file writes",
                "chat template differs",
            )


@cache  # it takes a tenth of a second
def _compiled(text: str) -> jinja2.Template:
    """As in transformers, but without its clock: text that changes daily cannot be compared."""
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": _raise, "strftime_now": _no_clock}
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    return environment.from_string(text)


def _no_clock(_: str) -> NoReturn:
    """Templates that ask whether it is there would else write a date of their own instead."""
    raise jinja2.TemplateError("it writes today's date, strftime_now, which no text that is trained can hold")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks the assistant's text, by MARKS around it."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in MARKS)
        return [begin, *body, end]


def describe(folder: str | Path, style: Style) -> str:
    """What records are written by, as a message. Raises SettingError."""
    if style.template == "qwen3_vl_nothink":
        return "qwen3_vl_nothink, whatever the model folder has"
    template, name = ChatTemplate.from_folder(folder), style.dialect.name
    if template is None:
        return f"{name}'s, since {folder} has none"
    if style.template == "checkpoint":
        marks = "{% generation %} marks" if "{% generation %}" in template.text else "its prompts"
        return f"{template.file} itself; {marks} say what is trained"
    if template.is_published:
        return f"{template.file}, {name}'s as published"
    return f"{name}'s, with which each record is compared as {template.file} writes it"


def first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if not isinstance(turn.content, str):
        kinds = ["text" if isinstance(p, str) else "video" if isinstance(p, Video) else "image" for p in turn.content]
        message["content"] = [{"type": kind, kind: str(p)} for kind, p in zip(kinds, turn.content, strict=True)]
    if turn.tool_calls:
        message["tool_calls"] = [_call(call) for call in turn.tool_calls]
    more = {"reasoning_content": turn.reasoning, "tool_call_id": turn.tool_call_id, "name": turn.name}
    return message | {key: value for key, value in more.items() if value is not None}


def _call(call: ToolCall) -> dict[str, Any]:
    own = {} if call.id is None else {"id": call.id}
    return {**own, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
