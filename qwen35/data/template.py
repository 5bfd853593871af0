"""Renders a record as the text that the model sees, and marks what is trained.

Pure functions that know no tokenizer. `qwen3_5` writes the text of the checkpoint's own
chat_template.jinja, `qwen3_vl_nothink` the plain form

    <|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n…<|im_end|>\\n

Only what the model has to write itself is trained: never what its generation prompt already holds
(the header, `<think>\\n`, the whole empty think block), always the closing `<|im_end|>\\n`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qwen35.data.record import Record, Role, ToolCall, Turn, Video
from qwen35.data.style import Style

Kind = Literal["text", "control", "image", "video"]
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
VIDEO_PAD = "<|video_pad|>"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
TOOLS_BEFORE = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
TOOLS_AFTER = (
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
    "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified "
    "format: an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n- You may provide optional reasoning for your function call in natural "
    "language BEFORE the function call, but NOT after\n- If there is no function call available, answer the question like "
    "normal with your current knowledge and do not tell the user about function calls\n</IMPORTANT>"
)


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample's text."""

    text: str
    trained: bool = False
    # "text": plain text, which never becomes a control token, whatever it spells. "control": one
    # control token. "image": becomes a start token, image tokens and an end token. "video": becomes
    # such a group for each pair of frames, with the pair's time as text before it.
    kind: Kind = "text"
    fresh: bool = False  # generation would begin here, so no token may span the boundary before it
    answer: bool = False  # the assistant's own words, in which spelled-out special tokens become tokens


def render(pieces: Sequence[Piece]) -> str:
    """The text of the pieces, with images and videos as the chat template writes them."""
    return "".join(p.text for p in pieces)


def training_pieces(record: Record, style: Style, train_on_prompt: bool = False) -> list[Piece]:
    """The pieces of a whole conversation, each marked as trained or not.

    style.enable_thinking (qwen3_5): None and True train the thoughts that the template keeps, which
    are those after the user's last question, or all; False drops them. train_on_prompt: also train
    the text of user, system and tool turns, but not their headers and images. A turn that the
    record excludes from the loss is never trained. Raises RecordError if the template cannot render
    the record.
    """
    effort = style.effort(style.thinking is not False)
    return _conversation(as_trained(record, style), style, effort, train_on_prompt)


def _conversation(record: Record, style: Style, effort: str, train_on_prompt: bool = False) -> list[Piece]:
    _check(record, style)
    trained = [_is_trained(record, i, train_on_prompt) for i in range(len(record.turns))]
    last_query = _last_query(record, style)
    has_system = record.turns[0].role == "system"
    pieces = _system(record, style, effort, trained[0] if has_system else train_on_prompt)
    for i, turn in enumerate(record.turns):
        if turn.role == "assistant":
            is_asked = bool(effort) and i > last_query
            pieces += _answer(record, i, style, trained[i], is_history=i <= last_query, is_asked_to_think=is_asked)
        elif turn.role == "tool":
            pieces += _tool_response(record.turns, i, trained[i])
        elif turn.role == "user":
            pieces += [*_header("user"), *_body(turn, trained[i], style.template == "qwen3_5"), *_end(trained[i])]
    return pieces


def _is_trained(record: Record, index: int, train_on_prompt: bool) -> bool:
    """Whether both the settings and the record ask for a turn to be trained. Raises RecordError."""
    turn = record.turns[index]
    if turn.role == "assistant":
        return turn.loss is not False
    if turn.loss and not train_on_prompt:
        raise record.error(
            f"turn {index} ({turn.role}) is marked to be trained, but only answers are; train_on_prompt: true also trains "
            "user, system and tool turns"
        )
    return train_on_prompt and turn.loss is not False


def prompt_pieces(record: Record, style: Style, thinking: bool) -> list[Piece]:
    """The conversation up to the point where the model answers, without a last assistant turn.

    Nothing in it is trained. thinking (qwen3_5): the prompt ends with an open `<think>\\n`, else
    with the empty block; see `thinks_by_default` and `has_thought`. style.enable_thinking: as in
    training_pieces, for the answers in the prompt.
    """
    turns = as_asked(as_trained(record, style))
    masked = replace(record, turns=tuple(replace(turn, loss=False) for turn in turns))
    opening = "" if style.template == "qwen3_vl_nothink" else "<think>\n" if thinking else EMPTY_THOUGHT
    history = _conversation(masked, style, style.effort(thinking))
    return [*history, *_header("assistant"), *_text(opening)]


def as_trained(record: Record, style: Style) -> Record:
    """The record without its thoughts, if the settings drop them. Raises RecordError."""
    if style.template == "qwen3_vl_nothink" or style.enable_thinking is not False:
        return record
    turns = [
        replace(turn, content=split_thought(record, style, i)[1], reasoning=None) if turn.role == "assistant" else turn
        for i, turn in enumerate(record.turns)
    ]
    return replace(record, turns=tuple(turns))


def as_asked(record: Record) -> tuple[Turn, ...]:
    """The turns before a last answer."""
    return record.turns[:-1] if record.turns[-1].role == "assistant" else record.turns


def has_thought(record: Record, style: Style) -> bool:
    """Whether the record's last answer is trained with a thought. Raises RecordError."""
    if style.template == "qwen3_vl_nothink" or style.enable_thinking is False:
        return False
    if style.enable_thinking and style.effort(True):
        return True
    return bool(split_thought(record, style, len(record.turns) - 1)[0])


def check_thoughts(record: Record, style: Style) -> None:
    """Raises RecordError if the template would drop part of an answer, or a thought has no end."""
    if style.template == "qwen3_vl_nothink":  # writes answers unchanged
        return
    for index, turn in enumerate(record.turns):
        before, *after = turn.text.split("</think>") if turn.role == "assistant" else [""]
        if after and not style.dialect.reads_think_blocks:
            raise record.error(
                f"turn {index} has a think block in its content, where {style.dialect.name}'s chat template reads no thoughts: "
                "it would write an empty thought before the block; put the thought into reasoning_content"
            )
        if len(after) > 1 or (after and before.rpartition("<think>")[0].strip()):
            raise record.error(
                f"turn {index} has several think blocks, or text before its only one, and the chat template would drop part of "
                "it; put the thought into reasoning_content"
            )
        if not after and before.lstrip().startswith("<think>"):
            raise record.error(
                f"turn {index} begins with a think block that never ends; leave out answers that were cut off"
            )


def dropped_thoughts(record: Record, style: Style) -> int:
    """How many thoughts of trained answers the template drops, unless the settings ask for it."""
    if style.enable_thinking is False:
        return 0
    answers = [i for i, turn in enumerate(record.turns) if turn.role == "assistant" and turn.loss is not False]
    if style.template == "qwen3_vl_nothink":
        return sum(bool(record.turns[i].reasoning) for i in answers)
    last_query = _last_query(record, style)
    return sum(i <= last_query and bool(split_thought(record, style, i)[0]) for i in answers)


def unprompted_answers(record: Record, style: Style) -> int:
    """How many answers are not trained because no prompt would end as they begin, see _answer."""
    if not style.effort(style.thinking is not False):
        return 0
    return sum(
        turn.role == "assistant" and turn.loss is not False and not split_thought(record, style, i)[0]
        for i, turn in list(enumerate(record.turns))[_last_query(record, style) + 1 : -1]
    )


def answer_text(turn: Turn, style: Style) -> str:
    """The text of an assistant turn followed by its tool calls, as the template writes them."""
    content = turn.text.strip()
    return content + _calls(turn.tool_calls, content, style)


def _text(text: str, trained: bool = False, fresh: bool = False, answer: bool = False) -> list[Piece]:
    return [Piece(text, trained, fresh=fresh, answer=answer)] if text else []


def _header(role: Role) -> list[Piece]:
    return [Piece(IM_START, kind="control"), Piece(f"{role}\n")]


def _end(trained: bool) -> list[Piece]:
    return [Piece(IM_END, trained, "control"), Piece("\n", trained)]


def _body(turn: Turn, trained: bool, trim: bool = True) -> list[Piece]:
    """The content of a turn, texts and visuals in order; trim: strip its outer white space."""
    parts = list(turn.parts)
    if trim and parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if trim and parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    body: list[Piece] = []
    for part in parts:
        if isinstance(part, str):
            body += _text(part, trained)
        else:
            is_video = isinstance(part, Video)
            pad = VIDEO_PAD if is_video else IMAGE_PAD
            body.append(Piece(VISION_START + pad + VISION_END, kind="video" if is_video else "image"))
    return body


def _system(record: Record, style: Style, effort: str, trained: bool) -> list[Piece]:
    """The system turn: how much to think, the tools, and the record's own system prompt."""
    first, is_plain = record.turns[0], style.template == "qwen3_vl_nothink"
    system = first.text if first.role == "system" else ""
    system = system if is_plain else system.strip()
    tools = TOOLS_BEFORE + "".join(f"\n{_json(tool)}" for tool in record.tools) + TOOLS_AFTER if record.tools else ""
    text = "\n\n".join(part for part in (effort, tools, system) if part)
    if not text and (first.role != "system" or (style.dialect.skips_empty_system and not is_plain)):
        return []
    return [*_header("system"), *_text(text, trained), *_end(trained)]


def _tool_response(turns: Sequence[Turn], index: int, trained: bool) -> list[Piece]:
    """A tool response; consecutive ones share one user turn."""
    pieces: list[Piece] = []
    if turns[index - 1].role != "tool":
        pieces += [Piece(IM_START, kind="control"), Piece("user")]
    pieces += [
        *_text("\n<tool_response>\n", trained),
        *_body(turns[index], trained),
        *_text("\n</tool_response>", trained),
    ]
    is_last = index + 1 == len(turns) or turns[index + 1].role != "tool"
    return [*pieces, *(_end(trained) if is_last else [])]


def _calls(calls: Sequence[ToolCall], content: str, style: Style) -> str:
    """The tool calls of an answer, and the gap between its content and them."""
    gap = "\n\n" if calls and content.strip() else ""
    return gap + "\n".join(
        f"<tool_call>\n<function={call.name}>\n"
        + "".join(
            f"<parameter={name}>\n{_argument(value, style)}\n</parameter>\n" for name, value in call.arguments.items()
        )
        + "</function>\n</tool_call>"
        for call in calls
    )


def _argument(value: Any, style: Style) -> str:
    is_json = isinstance(value, dict | list) or (style.dialect.json_arguments and not isinstance(value, str))
    return _json(value) if is_json else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _answer(
    record: Record, index: int, style: Style, trained: bool, is_history: bool, is_asked_to_think: bool
) -> list[Piece]:
    """is_history: the template drops the turn's thought, since a question follows.

    is_asked_to_think: a sentence at the head asks for it, so the prompt opens a thought. An answer
    without one then begins with a line break, which the next turns would have in one token with the
    prompt's own: only the last is trained, see unprompted_answers.
    """
    turn = record.turns[index]
    if style.template == "qwen3_vl_nothink":  # does not write reasoning_content
        return [*_header("assistant"), *_text(turn.text, trained, fresh=trained, answer=True), *_end(trained)]
    thought, content = split_thought(record, style, index)
    opening = ""
    if not is_history:
        is_open = bool(thought) or (is_asked_to_think and index + 1 == len(record.turns))
        trained &= is_open or not is_asked_to_think
        opening = "<think>\n" if is_open else EMPTY_THOUGHT
    answer = content + _calls(turn.tool_calls, content, style)
    content = f"{thought}\n</think>\n\n{answer}" if opening == "<think>\n" else answer
    # An answer without an opening is history only, tokenised together with what precedes it.
    fresh = trained and bool(opening)
    return [*_header("assistant"), *_text(opening), *_text(content, trained, fresh, answer=True), *_end(trained)]


def split_thought(record: Record, style: Style, index: int) -> tuple[str, str]:
    """(thought, answer) of an assistant turn; the thought is its reasoning or a think block.

    Raises RecordError if it has both.
    """
    turn = record.turns[index]
    content = turn.text.strip()
    if turn.reasoning is not None:
        if "</think>" in content:  # the template would write both, and the thought would be trained twice
            raise record.error(f"turn {index} has both a think block in its content and reasoning_content; keep one")
        return turn.reasoning.strip(), content
    if "</think>" not in content or not style.dialect.reads_think_blocks:
        return "", content
    before, after = content.split("</think>")[0], content.split("</think>")[-1]
    return before.rstrip("\n").split("<think>")[-1].strip(), after.lstrip("\n")


def is_query(turn: Turn) -> bool:
    """Whether a turn is a question: a user turn that is not a tool response in disguise."""
    first, last = turn.parts[0], turn.parts[-1]
    is_response = isinstance(first, str) and first.lstrip().startswith("<tool_response>")
    is_response = is_response and isinstance(last, str) and last.rstrip().endswith("</tool_response>")
    return turn.role == "user" and not is_response


def _last_query(record: Record, style: Style) -> int:
    """The last question, before which answers are history; -1 if the template writes none so."""
    if style.keeps_thoughts:
        return -1
    return max((i for i, turn in enumerate(record.turns) if is_query(turn)), default=len(record.turns) - 1)


def _check(record: Record, style: Style) -> None:
    if style.template == "qwen3_5" and not any(map(is_query, record.turns)):
        raise record.error("has no user question, only tool responses; the chat template cannot render that")
    has_tools = record.tools or any(turn.role == "tool" or turn.tool_calls for turn in record.turns)
    if style.template == "qwen3_vl_nothink" and has_tools:
        raise record.error("has tools, which the template qwen3_vl_nothink cannot render; use qwen3_5")
