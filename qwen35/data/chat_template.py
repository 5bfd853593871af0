"""The chat template of a model folder, compared with the text that is trained.

Whoever serves a model asks it by its own template, so a record whose text that template would write differently is refused.
"""

import hashlib
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
from qwen35.data.template import prompt_pieces, render, training_pieces
from qwen35.errors import SettingError, one_line

# sha256 of the templates whose text template.py gives for every record, as its tests prove: Qwen3.5's, 4B and up, and smaller
SAME = (
    "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715",
    "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80",
)
# what a program of somebody else's raises on values that it does not expect
BROKEN = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
SHOWN = 60  # characters of each text from where the two part


@dataclass(frozen=True)
class ChatTemplate:
    text: str
    file: str

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate | None":
        """None where there is nothing to compare: no template, or one of SAME. Raises SettingError."""
        found = read_chat_template(folder)
        if found is None or hashlib.sha256(found[0].removesuffix("\n").encode()).hexdigest() in SAME:
            return None
        template = cls(*found)
        try:
            _ = template._compiled
        except jinja2.TemplateError as error:
            raise SettingError(f"{template.file}: is not a chat template: {one_line(error)}") from None
        return template

    def check_training(self, record: Record, enable_thinking: bool | None) -> None:
        """Raises RecordError if the template writes another conversation than training_pieces."""
        given = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._compare(record, record.turns, render(training_pieces(record, "qwen3_5")), given)

    def check_prompt(self, record: Record, thinking: bool) -> None:
        """Raises RecordError if the template writes another prompt than prompt_pieces."""
        turns = record.turns[:-1] if record.turns[-1].role == "assistant" else record.turns
        given = {"add_generation_prompt": True, "enable_thinking": thinking}
        self._compare(record, turns, render(prompt_pieces(record, "qwen3_5", thinking)), given)

    def _compare(self, record: Record, turns: Sequence[Turn], ours: str, given: Mapping[str, bool]) -> None:
        messages, tools = [_message(turn) for turn in turns], list(record.tools) or None
        try:
            own = self._compiled.render(messages=messages, tools=tools, **{"add_generation_prompt": False, **given})
        except BROKEN as error:
            raise record.error(f"{self.file} has no text for it: {one_line(error)}", "chat template differs") from None
        if own != ours:
            at = next((i for i, (a, b) in enumerate(zip(own, ours, strict=False)) if a != b), min(len(own), len(ours)))
            raise record.error(
                f"{self.file}, by which the model will be asked, writes {own[at : at + SHOWN]!r} at character {at} of it, "
                f"where {ours[at : at + SHOWN]!r} would be trained; a template that writes the latter, as Qwen3.5's does, "
                "can take its place",
                "chat template differs",
            )

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """As transformers has it, but for its clock: what changes from day to day cannot be compared."""
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
        return environment.from_string(self.text)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant says, and writes nothing of its own."""

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
