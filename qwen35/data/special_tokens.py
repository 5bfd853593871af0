"""Special tokens that the text of records spells: which of them become tokens, and how many records have any."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import AddedToken

from qwen35.data.template import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from qwen35.errors import visible
from qwen35.wording import number_of

# Special tokens that separate turns, end an answer, or stand for what is not text. Text that spells one of them stays text,
# whoever wrote it: as the token it would forge a turn, an image or the end of the answer. Speech is among them, for models of
# this family that have it act on its tokens. All other special tokens mark up text (`<|box_start|>`, those that users add).
CONTROL_TOKENS = (
    IM_START, IM_END, "<|endoftext|>", VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD, "<|audio_start|>",
    "<|audio_end|>", "<|audio_pad|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_bos_single>", "<tts_text_eod>",
)  # fmt: skip
# What the chat template writes around thoughts, calls and responses. The published tokenizer does not count these as special;
# where another one does, they are tokens all the same.
TEMPLATE_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

Outcome = Literal["control", "text", "token"]
Spelled = dict[Outcome, set[str]]  # of one record: the special tokens that its text spells
MESSAGES: dict[Outcome, str] = {
    "control": (
        "control tokens are spelled in the text of {records}, where they stay characters "
        "(remove those that a chat template has left there)"
    ),
    "text": (
        "special tokens are spelled by user, system or tools in {records}, where they stay characters "
        "(special_tokens_in_prompts: text)"
    ),
    "token": "special tokens are spelled in the text of {records}, where each is one token",
}
MOST_NAMES = 5  # that a message shows


def disagreements(config: Mapping[str, Any], added: Iterable[AddedToken]) -> list[str]:
    """Added tokens that transformers would read otherwise than the tokenizer.json which has them, or has them not.

    config: tokenizer_config.json. Where it has an added_tokens_decoder, transformers has those alone, with the flags there;
    what it names elsewhere, and tokenizer.json has not, transformers adds.
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
    """Of the records of a file, or of several. Plain values only: the cache keeps it as JSON."""

    records: dict[Outcome, int] = field(default_factory=dict)
    first: dict[Outcome, str] = field(default_factory=dict)  # the source of the first such record
    names: dict[Outcome, list[str]] = field(default_factory=dict)  # of the tokens

    def add(self, source: str, spelled: Mapping[Outcome, Iterable[str]], records: int = 1) -> None:
        for outcome, names in spelled.items():
            self.records[outcome] = self.records.get(outcome, 0) + records
            self.first.setdefault(outcome, source)
            self.names[outcome] = sorted({*self.names.get(outcome, []), *names})

    @classmethod
    def merge(cls, parts: Iterable["SpecialTokens"]) -> "SpecialTokens":
        whole = cls()
        for part in parts:
            for outcome, count in part.records.items():
                whole.add(part.first[outcome], {outcome: part.names[outcome]}, count)
        return whole

    def lines(self) -> list[str]:
        """For the start of a run, and for what make show and make data print."""
        lines = []
        for outcome, message in MESSAGES.items():
            if outcome in self.records:
                names = self.names[outcome]
                shown = ", ".join(names[:MOST_NAMES]) + (
                    f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)
                )
                told = message.format(records=number_of(self.records[outcome], "record"))
                lines.append(visible(f"{told}: {shown}; first: {self.first[outcome]}"))
        return lines
