"""Compares the chat template of a model folder with the text that is trained.

Servers prompt a model through its own template, so a record that this template would write
differently is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen35.data.files import read_chat_template
from qwen35.data.record import Record, Turn, Video
from qwen35.data.style import DIALECTS, Style, digest_of
from qwen35.data.template import as_asked, as_trained, prompt_pieces, render, training_pieces
from qwen35.errors import SettingError, one_line

# What a foreign template may raise on values that it does not expect.
RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
SHOWN = 60  # characters of each text from the first difference on


@dataclass(frozen=True)
class ChatTemplate:
    text: str
    file: str

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate | None":
        """None if there is none, or a published one, which ours equals. Raises SettingError."""
        found = read_chat_template(folder)
        if found is None or any(digest_of(found[0]) in dialect.digests for dialect in DIALECTS):
            return None
        template = cls(*found)
        try:
            _ = template._compiled
        except jinja2.TemplateError as error:
            raise SettingError(f"{template.file}: is not a chat template: {one_line(error)}") from None
        return template

    def check_training(self, record: Record, style: Style) -> None:
        """Raises RecordError if the template writes a conversation unlike training_pieces."""
        turns = as_trained(record, style).turns
        self._compare(record, turns, render(training_pieces(record, style)), style, style.given(style.enable_thinking))

    def check_prompt(self, record: Record, style: Style, thinking: bool) -> None:
        """Raises RecordError if the template writes a prompt unlike prompt_pieces."""
        given = {"add_generation_prompt": True} | style.given(thinking)
        self._compare(
            record, as_asked(as_trained(record, style)), render(prompt_pieces(record, style, thinking)), style, given
        )

    def _compare(
        self, record: Record, turns: Sequence[Turn], ours: str, style: Style, given: Mapping[str, Any]
    ) -> None:
        messages, tools = [_message(turn) for turn in turns], list(record.tools) or None
        try:
            own = self._compiled.render(messages=messages, tools=tools, **{"add_generation_prompt": False, **given})
        except RENDER_ERRORS as error:
            raise record.error(f"{self.file} cannot render it: {one_line(error)}", "chat template differs") from None
        if own != ours:
            at = next((i for i, (a, b) in enumerate(zip(own, ours, strict=False)) if a != b), min(len(own), len(ours)))
            raise record.error(
                f"{self.file}, which prompts the model when it is served, writes {own[at : at + SHOWN]!r} at character {at}, "
                f"where {ours[at : at + SHOWN]!r} would be trained; replace it with a template that writes the latter, as "
                f"{style.dialect.name}'s does",
                "chat template differs",
            )

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """As in transformers, but without its clock: text that changes daily cannot be compared."""
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
        return environment.from_string(self.text)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks the assistant's text and writes nothing."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if not isinstance(turn.content, str):
        kinds = ["text" if isinstance(p, str) else "video" if isinstance(p, Video) else "image" for p in turn.content]
        message["content"] = [{"type": kind, kind: str(p)} for kind, p in zip(kinds, turn.content, strict=True)]
    if turn.tool_calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in turn.tool_calls]
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message if turn.reasoning is None else message | {"reasoning_content": turn.reasoning}
