"""Special tokens that the text of records spells: which of them become tokens, and how many records have any."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qwen35.data.record import VISIBLE
from qwen35.data.template import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from qwen35.words import number_of

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
    "control": "control tokens are spelled in the text of {records}, where they stay characters",
    "text": (
        "special tokens are spelled by user, system or tools in {records}, where they stay characters "
        "(special_tokens_in_prompts: text)"
    ),
    "token": "special tokens are spelled in the text of {records}, where each is one token",
}
MOST_NAMES = 5  # that a message shows


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
    def together(cls, parts: Iterable["SpecialTokens"]) -> "SpecialTokens":
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
                lines.append(f"{told}: {shown}; first: {self.first[outcome]}".translate(VISIBLE))
        return lines
