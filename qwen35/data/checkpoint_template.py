"""Pieces of a record as any chat template writes it, for `template: checkpoint`.

What is trained follows from the template: from what it writes as the prompt of each answer, and
from its `{% generation %}` marks if it has any. An answer is trained if the conversation continues
that prompt, so that the model will meet the same tokens before it when it is served.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import pairwise
from typing import Any

from qwen35.data.chat_template import MARKS, SHOWN, ChatTemplate, first_difference
from qwen35.data.conversations import wanted_answers
from qwen35.data.record import Record, Turn
from qwen35.data.style import Style
from qwen35.data.template import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Kind, Piece, as_asked

# What only the template may write is told from the same words in a record by this code point, put
# into the latter while it is rendered. Unicode keeps it for programs' own use, as it does MARKS.
HIDDEN = "\ufdd2"
IMAGE, VIDEO = (VISION_START + pad + VISION_END for pad in (IMAGE_PAD, VIDEO_PAD))
KINDS: dict[str, Kind] = {IM_START: "control", IM_END: "control", IMAGE: "image", VIDEO: "video"}
WRITTEN = re.compile("(" + "|".join(map(re.escape, KINDS)) + ")")
OTHER_CONTROL = re.compile(r"<\|\w+\|>")


def checkpoint_pieces(record: Record, template: ChatTemplate, style: Style) -> tuple[list[Piece], int]:
    """The pieces of a conversation, and how many answers are not trained though they were to be.

    Those are answers before the last, whose prompt the conversation does not continue. Raises
    RecordError, also if the last answer is one of them.
    """
    hidden, given = _hidden(record), style.given(style.thinking)
    answers = [i for i, turn in enumerate(record.turns) if turn.role == "assistant"]
    if marked := [i for i, turn in enumerate(record.turns) if turn.loss and turn.role != "assistant"]:
        raise record.error(f"turn {marked[0]} is marked to be trained, but template: checkpoint trains only answers")
    text, marks = _without_marks(template.render(hidden, hidden.turns, given, marks=True))
    if marks and len(marks) != len(answers):
        raise record.error(
            f"{template.file} marks {len(marks)} stretches as generated, of {len(answers)} answers",
            "chat template differs",
        )
    spans, prompts, unseen = [], set[int](), 0
    for i in wanted_answers(record, mask_history=False):
        span = _span(hidden, template, style, text, i)
        if span is None:
            if i < answers[-1]:
                unseen += 1
                continue
            prompt = _prompts(hidden, template, style, i)[0]
            at = first_difference(prompt, text)
            raise record.error(
                f"{template.file} writes {text[at : at + SHOWN]!r} at character {at} of the conversation, where its prompt for "
                f"the last answer has {prompt[at : at + SHOWN]!r}; the model would never meet what it was trained on",
                "chat template differs",
            )
        prompts.add(span[0])
        if marks:
            begin, end = marks[answers.index(i)]
            span = max(span[0], begin), min(span[1], end)
            if IM_END not in text[slice(*span)]:
                raise record.error(
                    f"{template.file} marks answer {text[slice(*span)][:SHOWN]!r} without its end, {IM_END}, so that the model "
                    "would not learn to stop",
                    "chat template differs",
                )
        spans.append(span)
    return _pieces(record, template, text, spans, prompts), unseen


def checkpoint_prompt(record: Record, template: ChatTemplate, style: Style, thinking: bool) -> list[Piece]:
    """As prompt_pieces: the template's own prompt. Raises RecordError."""
    hidden = _hidden(record)
    given = style.given(thinking) | {"add_generation_prompt": True}
    return _pieces(record, template, template.render(hidden, as_asked(hidden), given), [], set())


def _span(record: Record, template: ChatTemplate, style: Style, text: str, index: int) -> tuple[int, int] | None:
    """Where an answer and its end lie in the whole text, behind its longest prompt, or None."""
    whole = template.render(record, record.turns[: index + 1], style.given(style.thinking))
    fitting = [len(p) for p in _prompts(record, template, style, index) if text.startswith(p)]
    if not fitting or not text.startswith(whole):
        return None
    start, is_last = max(fitting), index == len(record.turns) - 1
    # A line break that follows another joins it in one token when the answer has become history,
    # so that later answers would have other tokens before them than in their prompts.
    return None if text[start : start + 1] == "\n" and not is_last else (start, len(whole))


def _prompts(record: Record, template: ChatTemplate, style: Style, index: int) -> list[str]:
    """What a server would write before an answer: with an open thought, and without."""
    given = [style.given(thinking) | {"add_generation_prompt": True} for thinking in style.choices]
    return [template.render(record, record.turns[:index], choice) for choice in given]


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the spans between its marks."""
    parts, spans, position, start = [], [], 0, 0
    for part in re.split(f"([{''.join(MARKS)}])", text):
        if part == MARKS[0]:
            start = position
        elif part == MARKS[1]:
            spans.append((start, position))
        else:
            parts.append(part)
            position += len(part)
    return "".join(parts), spans


def _pieces(
    record: Record, template: ChatTemplate, text: str, spans: Sequence[tuple[int, int]], prompts: Set[int]
) -> list[Piece]:
    """spans: what is trained; prompts: where the prompts of answers end, so that tokens begin."""
    pieces: list[Piece] = []
    bounds = [0, *(bound for span in spans for bound in span), len(text)]
    for number, (start, end) in enumerate(pairwise(bounds)):
        pieces += _cut(record, template, text[start:end], trained=number % 2 == 1, fresh=start in prompts)
    found, wanted = [p.kind for p in pieces if p.kind in ("image", "video")], _visual_kinds(record)
    if found != wanted:
        raise record.error(
            f"{template.file} writes {len(found)} images and videos of {len(wanted)}, or in another order",
            "chat template differs",
        )
    return pieces


def _cut(record: Record, template: ChatTemplate, text: str, trained: bool, fresh: bool) -> Iterator[Piece]:
    for part in filter(None, WRITTEN.split(text)):
        kind: Kind = KINDS.get(part, "text")
        if kind == "text" and (other := OTHER_CONTROL.search(part)):
            raise record.error(f"{template.file} writes {other[0]}, which is not built", "chat template differs")
        words = part.replace(HIDDEN, "")
        yield Piece(words, trained, kind, fresh=trained and fresh, answer=trained and kind == "text")
        fresh = False


def _hidden(record: Record) -> Record:
    """The record, with each "<|" of its own told apart from the template's."""
    tools = tuple(map(_hide, record.tools))
    return replace(record, turns=tuple(_hidden_turn(record, turn) for turn in record.turns), tools=tools)


def _hidden_turn(record: Record, turn: Turn) -> Turn:
    texts = [part for part in turn.parts if isinstance(part, str)]
    if any(mark in text for text in (*texts, turn.reasoning or "") for mark in (*MARKS, HIDDEN)):
        raise record.error("holds a code point that no text may hold (U+FDD0 to U+FDD2)")
    content = turn.content if isinstance(turn.content, str) else tuple(turn.content)
    hidden = (
        _hide(content) if isinstance(content, str) else tuple(_hide(p) if isinstance(p, str) else p for p in content)
    )
    calls = tuple(replace(c, arguments=_hide(dict(c.arguments)), id=_hide(c.id)) for c in turn.tool_calls)
    named = {"name": _hide(turn.name), "tool_call_id": _hide(turn.tool_call_id)}
    return replace(turn, content=hidden, reasoning=_hide(turn.reasoning), tool_calls=calls, **named)


def _hide(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("<|", f"<{HIDDEN}|")
    if isinstance(value, Mapping):
        return {_hide(key): _hide(inner) for key, inner in value.items()}
    return [_hide(inner) for inner in value] if isinstance(value, list | tuple) else value


def _visual_kinds(record: Record) -> list[str]:
    images = set(map(id, record.images))
    return ["image" if id(visual) in images else "video" for visual in record.visuals]
