"""Preference pairs: two answers to one prompt, of which one is chosen and the other rejected.

trl            {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, or each a list of messages
               {"chosen": [{"role": "user", …}, …], "rejected": [{"role": "user", …}, …]}
LLaMA-Factory  {"conversations": […], "chosen": {"from": "gpt", …}, "rejected": {"from": "gpt", …}}
               {"instruction": "…", "input": "…", "chosen": "…", "rejected": "…"}, format: alpaca
ms-swift       {"messages": [… and the chosen answer], "rejected_response": "…"}

What both conversations begin with is their prompt, and only the answers behind it are trained.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwen35.data.alpaca import alpaca_turns
from qwen35.data.content import kind
from qwen35.data.fields import SHARED, FieldNames, Names, is_nothing
from qwen35.data.record import Record, RecordError
from qwen35.data.template import is_query

SHOWN = 60  # characters of each prompt where two differ
Side = tuple[str, list[Any]]  # a conversation, and the fields that it is from


def pair_turns(raw: Mapping[str, Any], names: FieldNames, source: str) -> tuple[Side, Side]:
    """The conversations with the chosen and with the rejected answer. Raises RecordError."""
    raw = {name: value for name, value in raw.items() if not is_nothing(value)}
    if "loss_mask" in raw.keys() - names.ignored:
        raise RecordError(f"{source}: has loss_mask, but of a pair the two answers are trained, and nothing else")
    for name in SHARED:
        if raw.get(f"rejected_{name}", raw.get(name)) != raw.get(name):
            raise RecordError(f"{source}: has rejected_{name} other than its {name}; the answers of a pair share them")
    chosen, rejected = (side.find(raw, source) for side in names.answers)
    if names.is_alpaca:
        prompts = [alpaca_turns(raw, names, source, answered=False)]
    else:
        prompts = [found for name in (names.messages, names.prompt) if (found := name.find(raw, source))]
    given = [(field, _turns(value, "user", f"{source}, {field}")) for field, value in prompts]
    is_answered = bool(given) and _role(given[0][1][-1], names, source) == "assistant"
    if rejected is None or (chosen is None and not is_answered):
        raise RecordError(
            f"{source}: has no {'rejected' if rejected is None else 'chosen'} answer in {names.answers[rejected is None]}, but "
            f"training.stage: dpo learns from pairs; it has {', '.join(map(repr, raw))[:200]}"
        )
    good, turns = (chosen[0], _turns(chosen[1], "assistant", f"{source}, {chosen[0]}")) if chosen else given[0]
    field = good
    if _role(turns[0], names, source) == "assistant":
        if not given:
            raise RecordError(f"{source}: has no prompt in {names.messages} or {names.prompt}, and {good} is an answer")
        field, prompt = given[0]
        if is_answered:
            raise RecordError(f"{source}: {field} ends with an answer, and there is {good} too; keep one")
        good, turns = f"{field} and {good}", prompt + turns
    else:  # a list of answers comes in place of all that follows the last question
        questions = [i for i, turn in enumerate(turns) if _role(turn, names, source) == "user"]
        prompt = turns[: max(questions, default=-1) + 1] if isinstance(rejected[1], list) else turns[:-1]
    for name, part in given:
        texts = [_read(names.content, turn, source) for turn in turns]
        if turns[: len(part)] != part and (len(part) > 1 or _read(names.content, part[0], source) not in texts):
            raise RecordError(f"{source}: {name} is not what {good} begins with; a pair has one prompt, keep one")
    bad, others = rejected[0], _turns(rejected[1], "assistant", f"{source}, {rejected[0]}")
    if _role(others[0], names, source) == "assistant":
        bad, others = f"{field} and {bad}", prompt + others
    return (good, turns), (bad, others)


def is_scored_otherwise(raw: Mapping[str, Any]) -> bool:
    """Whether a record's scores do not prefer the chosen answer."""
    forms = ("{}_score", "{}_rating", "score_{}", "rating_{}")
    for good, bad in ([raw.get(form.format(side)) for side in ("chosen", "rejected")] for form in forms):
        if isinstance(good, int | float) and isinstance(bad, int | float) and good <= bad:
            return True
    return False


def _turns(value: Any, role: str, where: str) -> list[Any]:
    """A list of turns, one turn, or the text of one."""
    turn = {"role": role, "content": value} if isinstance(value, str) else value
    turns = [turn] if isinstance(turn, dict) else turn
    if not isinstance(turns, list):
        raise RecordError(f"{where}: is {kind(value)}, not a text, a turn or a list of turns")
    return turns


def _read(field: Names, turn: Any, source: str) -> Any:
    found = field.find(turn, source) if isinstance(turn, dict) else None
    return found and found[1]


def _role(turn: Any, names: FieldNames, source: str) -> str | None:
    tag = _read(names.role, turn, source)
    return names.roles.get(tag) if isinstance(tag, str) else None


def paired(chosen: Record, rejected: Record) -> Record:
    """The pair, in which only the answers are to be trained. Raises RecordError."""
    sides = [[replace(turn, loss=None) for turn in record.turns] for record in (chosen, rejected)]
    shorter = min(map(len, sides))
    same = next((i for i in range(shorter) if sides[0][i] != sides[1][i]), shorter)
    start = same  # of both answers
    while start and not all(len(turns) > start and turns[start].role == "assistant" for turns in sides):
        start -= 1
    if any(is_query(turn) for turns in sides for turn in turns[start:]):
        both = [" ".join(map(str, turns[same].parts)) if same < len(turns) else "" for turns in sides]
        shown = " and ".join(repr(text[:SHOWN]) for text in both)
        raise chosen.error(
            f"the prompts of its two answers differ: turn {same} is {shown}; a pair is two answers to one prompt",
            "prompts that differ",
        )
    for name, record in (("chosen", chosen), ("rejected", rejected)):
        for i, turn in enumerate(record.turns):
            is_answer = i >= start and turn.role == "assistant"
            if turn.loss not in (None, is_answer):
                raise record.error(
                    f"turn {i} ({name}) is marked {'' if turn.loss else 'not '}to be trained, but of a pair the two answers "
                    "are, and nothing else; leave the mark out",
                    "loss mask of a pair",
                )
            if is_answer and not (turn.text.strip() or turn.reasoning or turn.tool_calls):
                raise record.error(f"the {name} answer is empty; leave the pair out", "empty answer")
    kept = [
        replace(record, turns=tuple(replace(turn, loss=None if i >= start else False) for i, turn in enumerate(turns)))
        for record, turns in zip((chosen, rejected), sides, strict=True)
    ]
    return replace(kept[0], rejected=kept[1])
