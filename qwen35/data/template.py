"""A record as the text that the model sees, and which of it is trained. Pure functions, no tokenizer.

`qwen3_5` gives the text of the checkpoint's own chat_template.jinja; `qwen3_vl_nothink` the plain form

    <|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n…<|im_end|>\\n

Trained is what the model has to write itself: never what its generation prompt would already hold (the header, `<think>\\n`,
the whole empty think block), always the closing `<|im_end|>\\n`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen35.data.files import read_config
from qwen35.data.formats import IMAGE_PLACEHOLDER, Record, Role, Turn
from qwen35.errors import SettingError

Template = Literal["qwen3_vl_nothink", "qwen3_5"]

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
VIDEO_PAD = "<|video_pad|>"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample.

    kind "text" is plain: what it spells is never a control token. "control" is one control token. "image" is the place of an
    image: its start, its tokens, its end. `fresh`: generation would begin here, so tokens do not join what comes before.
    """

    text: str
    trained: bool = False
    kind: Literal["text", "control", "image"] = "text"
    fresh: bool = False


def render(pieces: Sequence[Piece]) -> str:
    """The text of the pieces, an image as the chat template writes it."""
    return "".join(p.text for p in pieces)


def training_pieces(
    record: Record,
    template: Template,
    enable_thinking: bool | None = None,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> list[Piece]:
    """The whole conversation.

    enable_thinking (qwen3_5): None and True train the thoughts that the template keeps, those after the last question of the
    user; False drops them. train_on_prompt: what user and system say is trained too, their headers and images are not.
    mask_history: only the last answer is trained. Raises RecordError where the template has no text for the record.
    """
    last = len(record.turns) - 1
    pieces = []
    for i, turn in enumerate(record.turns):
        if turn.role == "assistant":
            trained = i == last or not mask_history
            pieces += _answer(record, i, template, trained, drop_thought=enable_thinking is False)
        else:
            pieces += _prompt_turn(turn, template, train_on_prompt)
    _check_query(record, template)
    return pieces


def prompt_pieces(record: Record, template: Template, thinking: bool) -> list[Piece]:
    """The conversation up to where the model answers: a last assistant turn is left out, nothing is trained.

    thinking (qwen3_5): the prompt ends with an open `<think>\\n`, else with the empty block. See `thinks_by_default`.
    """
    turns = record.turns[:-1] if record.turns[-1].role == "assistant" else record.turns
    asked = Record(record.source, turns, record.images)
    opening = "" if template == "qwen3_vl_nothink" else "<think>\n" if thinking else EMPTY_THOUGHT
    return [*training_pieces(asked, template, mask_history=True), *_header("assistant"), *_text(opening)]


def thinks_by_default(folder: str | Path) -> bool:
    """Whether a checkpoint's own template opens a thought where `enable_thinking` is not given.

    The published templates differ in their generation prompt alone: the one that opens a thought unless told not to tests
    `enable_thinking is false`, the other `enable_thinking is true`. Read from chat_template.jinja, else from
    tokenizer_config.json. Raises SettingError if neither says so.
    """
    folder = Path(folder)
    own = folder / "chat_template.jinja"
    if own.is_file():
        text = own.read_text(encoding="utf-8", errors="replace")
    else:
        text = str(read_config(folder, "tokenizer_config.json").get("chat_template"))
    if ("enable_thinking is false" in text) == ("enable_thinking is true" in text):
        raise SettingError(
            f"{folder}: its chat template does not say if it thinks by default; set enable_thinking (or --thinking)"
        )
    return "enable_thinking is false" in text


def _text(text: str, trained: bool = False, fresh: bool = False) -> list[Piece]:
    return [Piece(text, trained, fresh=fresh)] if text else []


def _header(role: Role) -> list[Piece]:
    return [Piece(IM_START, kind="control"), Piece(f"{role}\n")]


def _end(trained: bool) -> list[Piece]:
    return [Piece(IM_END, trained, "control"), Piece("\n", trained)]


def _prompt_turn(turn: Turn, template: Template, trained: bool) -> list[Piece]:
    """A system or user turn; in a user turn, images stand where the placeholders are."""
    content = _trim(turn.content, template)
    parts = content.split(IMAGE_PLACEHOLDER) if turn.role == "user" else [content]
    body = _text(parts[0], trained)
    for part in parts[1:]:
        body += [Piece(VISION_START + IMAGE_PAD + VISION_END, kind="image"), *_text(part, trained)]
    return [*_header(turn.role), *body, *_end(trained)]


def _answer(record: Record, index: int, template: Template, trained: bool, drop_thought: bool) -> list[Piece]:
    turn = record.turns[index]
    if template == "qwen3_vl_nothink":  # has no place for reasoning_content
        return [*_header("assistant"), *_text(turn.content, trained, fresh=trained), *_end(trained)]
    thought, content = _split_thought(record, index)
    opening = ""
    if index > _last_query(record.turns):  # the template drops the thoughts before the user's last question
        thought = "" if drop_thought else thought
        opening = "<think>\n" if thought else EMPTY_THOUGHT
        content = f"{thought}\n</think>\n\n{content}" if thought else content
    return [*_header("assistant"), *_text(opening), *_text(content, trained, fresh=trained), *_end(trained)]


def _split_thought(record: Record, index: int) -> tuple[str, str]:
    """(thought, answer) of an assistant turn, from `reasoning_content` or from a think block in the content."""
    turn = record.turns[index]
    content = turn.content.strip()
    if turn.reasoning is not None:
        if "</think>" in content:  # the template would write both, and the thought would be trained twice
            raise record.error(f"turn {index} has a think block in its content and reasoning_content too; keep one")
        return turn.reasoning.strip(), content
    if "</think>" not in content:
        return "", content
    before, after = content.split("</think>")[0], content.split("</think>")[-1]
    return before.rstrip("\n").split("<think>")[-1].strip(), after.lstrip("\n")


def _is_query(turn: Turn) -> bool:
    """A user turn that is not just a tool's response, handed on in the user's name."""
    content = turn.content.strip()
    return turn.role == "user" and not (content.startswith("<tool_response>") and content.endswith("</tool_response>"))


def _last_query(turns: Sequence[Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if _is_query(turn)), default=len(turns) - 1)


def _check_query(record: Record, template: Template) -> None:
    if template == "qwen3_5" and not any(map(_is_query, record.turns)):
        raise record.error("no question of the user, only tool responses; the chat template has no text for that")


def _trim(content: str, template: Template) -> str:
    return content.strip() if template == "qwen3_5" else content
