"""How conversations are written: the dialects of the family's chat templates, and a run's choices.

Sources: the chat_template.jinja of Qwen3.5, 3.6 and 3.8 as published.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen35.config.schema import BasicParameters
from qwen35.data.files import read_chat_template
from qwen35.errors import SettingError

Template = Literal["qwen3_vl_nothink", "qwen3_5", "checkpoint"]
CHOICES = ("enable_thinking", "preserve_thinking", "reasoning_effort")  # settings that templates take
DEFAULT_EFFORT = "xhigh"


@dataclass(frozen=True)
class Dialect:
    """In what the chat templates of the family's generations differ."""

    name: str
    digests: frozenset[str]  # sha256 of the published templates, without a last line break
    # whether the thoughts of answers before the last question are kept by default; None: never
    keeps_thoughts: bool | None
    reads_think_blocks: bool  # a think block in the content of an answer is its thought
    json_arguments: bool  # of calls: true and null, where the first one wrote True and None
    skips_empty_system: bool
    # reasoning_effort -> the sentence that begins the system turn while thinking is on
    efforts: Mapping[str, str] = field(default_factory=dict, hash=False)


# The first has two published templates, of the models from 4B on, and of the smaller ones.
QWEN3_5 = Dialect(
    "Qwen3.5",
    frozenset(
        (
            "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715",
            "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80",
        )
    ),
    keeps_thoughts=None,
    reads_think_blocks=True,
    json_arguments=False,
    skips_empty_system=False,
)
QWEN3_6 = Dialect(
    "Qwen3.6",
    frozenset(("e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259",)),
    keeps_thoughts=False,
    reads_think_blocks=True,
    json_arguments=True,
    skips_empty_system=False,
)
QWEN3_8 = Dialect(
    "Qwen3.8",
    frozenset(("c3cf9e34abf4f9e36c2d72165aa9c132d3e2a725b6c2586aaa3a8af9d7a81041",)),
    keeps_thoughts=True,
    reads_think_blocks=False,
    json_arguments=True,
    skips_empty_system=True,
    efforts={
        "xhigh": (
            "Reasoning effort is set to xhigh. Please think carefully through the task, validate key assumptions, consider "
            "plausible alternatives, and prioritize correctness, consistency, and clarity in the final answer."
        ),
        "medium": "",
        "low": (
            "Reasoning effort is set to low. Keep your thinking brief and focused, moving directly to the conclusion without "
            "unnecessary elaboration."
        ),
    },
)
DIALECTS = (QWEN3_8, QWEN3_6, QWEN3_5)


@dataclass(frozen=True)
class Style:
    """A template, its dialect, and the choices that a server can make too."""

    template: Template = "qwen3_5"
    dialect: Dialect = QWEN3_5
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None
    reasoning_effort: str | None = None
    asked_to_think: bool | None = None  # what a record asks for, see conversations.py, if the settings do not say

    @property
    def thinking(self) -> bool | None:
        """enable_thinking as a server is given it; None: not given."""
        return self.asked_to_think if self.enable_thinking is None else self.enable_thinking

    @property
    def choices(self) -> tuple[bool, ...]:
        """Whether a server asks for thoughts; both, where that does not change the conversation."""
        thinking = self.thinking
        return (True, False) if thinking is None or (thinking and not self.effort(True)) else (thinking,)

    @property
    def keeps_thoughts(self) -> bool:
        """Whether thoughts before the last question stay."""
        return bool(self.dialect.keeps_thoughts if self.preserve_thinking is None else self.preserve_thinking)

    def effort(self, thinking: bool) -> str:
        """The sentence at the head of the system turn, "" for none."""
        if self.template == "qwen3_vl_nothink" or not thinking:
            return ""
        return self.dialect.efforts.get(self.reasoning_effort or DEFAULT_EFFORT, "")

    def given(self, thinking: bool | None) -> dict[str, Any]:
        """What a renderer of the checkpoint's own template is given; None: not given."""
        values = {
            "enable_thinking": thinking,
            "preserve_thinking": self.preserve_thinking,
            "reasoning_effort": self.reasoning_effort,
        }
        return {name: value for name, value in values.items() if value is not None}


DEFAULT_STYLE = Style()


def style_of(folder: str | Path, basic: BasicParameters) -> Style:
    """The settings' choices in the dialect of a model folder's template.

    A template that is none of the published ones is taken for the dialect whose choices it names.
    Raises SettingError for a choice that the dialect does not know.
    """
    if basic.template == "qwen3_vl_nothink":
        return Style(basic.template)
    dialect = dialect_of(folder)
    for name, knows in (
        ("preserve_thinking", dialect.keeps_thoughts is not None),
        ("reasoning_effort", dialect.efforts),
    ):
        if getattr(basic, name) is not None and not knows:
            raise SettingError(
                f"data.dataset_param.basic_parameters.{name} means nothing to the chat template of {folder}, which writes as "
                f"{dialect.name}'s does; leave it out"
            )
    return Style(basic.template, dialect, *(getattr(basic, name) for name in CHOICES))


def dialect_of(folder: str | Path) -> Dialect:
    """Raises SettingError."""
    text, _ = read_chat_template(folder) or ("", "")
    digest = digest_of(text)
    for dialect in DIALECTS:
        if digest in dialect.digests:
            return dialect
    return QWEN3_8 if "reasoning_effort" in text else QWEN3_6 if "preserve_thinking" in text else QWEN3_5


def digest_of(template: str) -> str:
    """sha256; Jinja drops one line break at the end."""
    return hashlib.sha256(template.removesuffix("\n").encode()).hexdigest()


def thinks_by_default(folder: str | Path) -> bool:
    """Whether a checkpoint's own template opens a thought if `enable_thinking` is not given.

    The published generation prompts test `enable_thinking is false` if they think by default, and
    `enable_thinking is true` if not. Raises SettingError if there is neither test, or both.
    """
    text, _ = read_chat_template(folder) or ("", "")
    prompt = text.rpartition("add_generation_prompt")[2]
    if ("enable_thinking is false" in prompt) == ("enable_thinking is true" in prompt):
        raise SettingError(
            f"{folder}: its chat template does not say whether it thinks by default; set enable_thinking (or --thinking)"
        )
    return "enable_thinking is false" in prompt
