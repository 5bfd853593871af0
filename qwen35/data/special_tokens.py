"""Special tokens that the text of records spells: which become tokens, and how many records."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import AddedToken

from qwen35.data.template import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from qwen35.errors import visible
from qwen35.wording import number_of

# Special tokens that separate turns, end an answer, or stand for something other than text. Text
# that spells one of them stays text, whoever wrote it: as a token it would forge a turn, an image
# or the end of the answer. The audio tokens are here because speech models of this family act on
# them. All other special tokens are markup (`<|box_start|>`, and those that users add).
CONTROL_TOKENS = (
    IM_START, IM_END, "<|endoftext|>", VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD, "<|audio_start|>",
    "<|audio_end|>", "<|audio_pad|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_bos_single>", "<tts_text_eod>",
)  # fmt: skip
# The chat template writes these around thoughts, calls and responses. They are tokens in any text,
# even with a tokenizer that, unlike the published one, marks them as special.
TEMPLATE_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

Outcome = Literal["control", "text", "token"]  # a control token kept as text, markup kept as text, markup as a token
Spelled = dict[Outcome, set[str]]  # the special tokens that the text of one record spells
MESSAGES: dict[Outcome, str] = {
    "control": (
        "control tokens are spelled in the text of {records}, and kept as characters "
        "(remove any that a chat template has left there)"
    ),
    "text": (
        "special tokens are spelled by user, system or tools in {records}, and kept as characters "
        "(special_tokens_in_prompts: text)"
    ),
    "token": "special tokens are spelled in the text of {records}, and each becomes one token",
}
MAX_NAMES = 5  # that a message shows


def disagreements(config: Mapping[str, Any], added: Iterable[AddedToken]) -> list[str]:
    """Names of added tokens that transformers would treat differently from tokenizer.json.

    config: tokenizer_config.json; added: the added tokens of tokenizer.json. If config has an
    added_tokens_decoder, transformers uses only its tokens, with its flags. It adds tokens that
    config names elsewhere and tokenizer.json lacks.
    """
    tokens = {token.content: token for token in added}
    named = [config.get(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "cls", "mask")]
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        entries = config.get(key)
        named += entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else []
    names = {entry.get("content") if isinstance(entry, dict) else entry for entry in named if entry is not None}
    odd = {str(name) for name in names if name not in tokens}
    if isinstance(listed := config.get("added_tokens_decoder"), dict):
        entries = {
            entry["content"]: entry for entry in listed.values() if isinstance(entry, dict) and "content" in entry
        }
        for name, token in tokens.items():
            flags = {flag: getattr(token, flag) for flag in ("normalized", "lstrip", "rstrip", "single_word")}
            if name not in entries or flags != {flag: entries[name].get(flag, flags[flag]) for flag in flags}:
                odd.add(name)
    return sorted(odd)


@dataclass
class SpecialTokens:
    """Counts for the records of one or several files; plain values, cached as JSON."""

    records: dict[Outcome, int] = field(default_factory=dict)  # how many spell any
    first: dict[Outcome, str] = field(default_factory=dict)  # source of the first such record
    names: dict[Outcome, list[str]] = field(default_factory=dict)  # of the tokens

    def add(self, source: str, spelled: Mapping[Outcome, Iterable[str]], records: int = 1) -> None:
        for outcome, names in spelled.items():
            self.records[outcome] = self.records.get(outcome, 0) + records
            self.first.setdefault(outcome, source)
            self.names[outcome] = sorted({*self.names.get(outcome, []), *names})

    @classmethod
    def merge(cls, parts: Iterable["SpecialTokens"]) -> "SpecialTokens":
        merged = cls()
        for part in parts:
            for outcome, count in part.records.items():
                merged.add(part.first[outcome], {outcome: part.names[outcome]}, count)
        return merged

    def lines(self) -> list[str]:
        """The messages for a run's start, make show and make data."""
        lines = []
        for outcome, message in MESSAGES.items():
            if outcome in self.records:
                names = self.names[outcome]
                more = f" and {len(names) - MAX_NAMES} more" * (len(names) > MAX_NAMES)
                records = number_of(self.records[outcome], "record")
                shown = ", ".join(names[:MAX_NAMES]) + more
                lines.append(visible(f"{message.format(records=records)}: {shown}; first: {self.first[outcome]}"))
        return lines
