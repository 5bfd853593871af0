"""Parses the turns of a record, checks their order, and assigns calls and tool responses."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qwen35.data.content import Parser, kind, text
from qwen35.data.fields import LOSS_FIELDS, FieldNames, Names, is_nothing
from qwen35.data.record import RecordError, Role, Turn
from qwen35.wording import number_of

MAY_FOLLOW = {  # role -> the roles of the turns that may follow it; None: the start, or a system turn
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool", "user"),
}


def parse_turns(
    raw: Any, where: str, names: FieldNames, parser: Parser, loss_mask: Any, answered: bool
) -> tuple[list[Turn], int]:
    """The turns, and how many tool responses were moved into the order of their calls.

    raw: the list of turns; loss_mask: the record's own. The content of a list becomes a tuple, with
    a Placeholder for each of the record's own images and videos. Raises RecordError.
    """
    if not isinstance(raw, list) or not raw:
        raise RecordError(f"{where}: is {kind(raw)}, not a list of turns")
    entries = [(i, turn) for i, entry in enumerate(raw) for turn in _turns_of(entry, names)]
    if loss_mask is not None and (not isinstance(loss_mask, list) or len(loss_mask) != len(entries)):
        what = f"has {len(loss_mask)} entries" if isinstance(loss_mask, list) else f"is {kind(loss_mask)}"
        raise RecordError(
            f"{where}: has {number_of(len(entries), 'turn')}, but the record's loss_mask {what}; it needs one entry per turn"
        )
    turns: list[Turn] = []
    numbers: list[int] = []  # index of each turn in `raw`
    for place, (i, entry) in enumerate(entries):
        mask = None if loss_mask is None else loss_mask[place]
        turn = _parse_turn(entry, f"{where}[{i}]", names, parser, mask)
        before = turns[-1] if turns else None
        if before is not None and before.role == turn.role == "assistant" and _is_only_calls(turn):
            if (before.loss is False) != (turn.loss is False):
                raise RecordError(f"{where}[{i}]: a call and the answer before it are one turn; train both or neither")
            turns[-1] = replace(before, tool_calls=before.tool_calls + turn.tool_calls)
        else:
            turns.append(turn)
            numbers.append(i)
    _check_order(turns, numbers, where, answered)
    return _with_responses(turns, numbers, where)


def _turns_of(entry: Any, names: FieldNames) -> list[Any]:
    """The turn; or several, of an object of roles: {"human": "Hi", "assistant": "Yo"}."""
    if isinstance(entry, dict) and entry and entry.keys() <= names.roles.keys():
        return [{"role": role, "content": content} for role, content in entry.items()]
    return [entry]


def _is_only_calls(turn: Turn) -> bool:
    return bool(turn.tool_calls) and not turn.reasoning and not turn.text.strip()


def _parse_turn(entry: Any, where: str, names: FieldNames, parser: Parser, mask: Any) -> Turn:
    if not isinstance(entry, dict):
        raise RecordError(f"{where}: is {kind(entry)}, not an object")
    role_field, tag = _required(names.role, entry, where, "has no field")
    role = names.roles.get(tag) if isinstance(tag, str) else None
    if role is None:
        raise RecordError(
            f"{where}.{role_field}: {repr(tag)[:80]} is not one of {', '.join(names.roles)}; name other roles in attr"
        )
    content: Any = ""
    if mask is None and tag not in names.calls and entry.keys() <= names.plain:
        field, value = _required(names.content, entry, where, "has no text in")
        content = parser.content(value, f"{where}.{field}", role)
        return Turn(role, content)
    parser.check(entry, names.of_turn, where)
    loss = _loss(entry, where, names, mask)
    calls = parser.calls(entry.get("tool_calls") or [], f"{where}.tool_calls")  # parquet has the field in every turn
    if calls and role != "assistant":
        raise RecordError(f"{where}: tool_calls in a turn of the {role}; only the assistant calls tools")
    if tag in names.calls:
        if calls:
            raise RecordError(
                f"{where}: has tool_calls in a turn of the role {tag}, whose content is the call; keep one"
            )
        field, value = _required(names.content, entry, where, "has no call in")
        calls = parser.calls(value, f"{where}.{field}")
    elif not calls or names.content.find(entry, where) is not None:
        field, value = _required(names.content, entry, where, "has no text in")
        content = parser.content(value, f"{where}.{field}", role)
    thought = entry.get("reasoning_content") or None
    if thought is not None and role != "assistant":
        raise RecordError(f"{where}: reasoning_content in a turn of the {role}; only the assistant thinks")
    reasoning = None if thought is None else text(thought, f"{where}.reasoning_content")
    call, name = (None if is_nothing(entry.get(key)) else str(entry[key]) for key in ("tool_call_id", "name"))
    return Turn(role, content, reasoning, calls, loss, call, name)


def _loss(entry: dict[str, Any], where: str, names: FieldNames, mask: Any) -> bool | None:
    """Whether a turn is trained, as the turn or the record's loss_mask says; None: neither does."""
    given = {name: entry[name] for name in LOSS_FIELDS if name in names.loss and entry.get(name) is not None}
    if mask is not None:
        given["the record's loss_mask"] = mask
    for name, value in given.items():
        if value not in (0, 1):
            raise RecordError(
                f"{where}: {name} is {repr(value)[:80]}, neither 0 nor 1; a turn is trained or not, without a weight"
            )
    if len(set(map(bool, given.values()))) > 1:
        raise RecordError(f"{where}: {' and '.join(given)} differ on whether it is trained; keep one")
    return next(map(bool, given.values()), None)


def _required(names: Names, entry: dict[str, Any], where: str, missing: str) -> tuple[str, Any]:
    found = names.find(entry, where)
    if found is None:
        raise RecordError(f"{where}: {missing} {names}")
    return found


def _check_order(turns: Sequence[Turn], numbers: Sequence[int], where: str, answered: bool) -> None:
    offset = 1 if turns[0].role == "system" else 0
    before: Role | None = None
    for turn, number in zip(turns[offset:], numbers[offset:], strict=True):
        expected = MAY_FOLLOW[before]
        if turn.role not in expected:
            raise RecordError(
                f"{where}[{number}]: {turn.role} turn where {expected[0]} is expected; "
                "turns are [system,] user, assistant, user, assistant, …"
            )
        before = turn.role
    if len(turns) == offset:
        raise RecordError(f"{where}: has no user turn")
    if answered and before != "assistant":
        raise RecordError(f"{where}[{numbers[-1]}]: ends with a {before} turn; there is no answer to train on")


def _with_responses(turns: list[Turn], numbers: Sequence[int], where: str) -> tuple[list[Turn], int]:
    """The turns with the responses in the order of their calls, and how many were moved.

    The template writes no ids, so only the order tells the model which response belongs to which
    call. Raises RecordError unless each call has one response.
    """
    reordered = 0
    for i, turn in enumerate(turns):
        if not turn.tool_calls or i + 1 == len(turns):
            continue
        end = i + 1
        while end < len(turns) and turns[end].role == "tool":
            end += 1
        responses, here = turns[i + 1 : end], f"{where}[{numbers[i]}]"
        if not responses and turns[i + 1].text.lstrip().startswith("<tool_response>"):  # written out in a user turn
            continue
        if len(responses) != len(turn.tool_calls):
            raise RecordError(
                f"{here}: {number_of(len(turn.tool_calls), 'call')} but {number_of(len(responses), 'tool response')} after "
                "it; each call needs one tool turn"
            )
        calls, answers = [call.id for call in turn.tool_calls], [response.tool_call_id for response in responses]
        if None in (*calls, *answers) and all(None in p or p[0] == p[1] for p in zip(calls, answers, strict=True)):
            continue
        if len(set(calls)) < len(calls) or set(calls) != set(answers):
            raise RecordError(f"{here}: the calls' ids are {_listed(calls)}, but the responses have {_listed(answers)}")
        if calls != answers:
            turns[i + 1 : end] = [responses[answers.index(call)] for call in calls]
            reordered += len(calls)
    return turns, reordered


def _listed(ids: Sequence[Any]) -> str:
    return ", ".join(map(str, ids))[:200]
