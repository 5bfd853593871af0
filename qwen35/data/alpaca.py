"""Alpaca's records: a question in one or two fields, its answer in another, and earlier pairs."""

from collections.abc import Mapping
from typing import Any

from qwen35.data.content import kind, text
from qwen35.data.fields import FieldNames, is_nothing
from qwen35.data.record import RecordError


def alpaca_turns(
    raw: Mapping[str, Any], names: FieldNames, source: str, answered: bool
) -> tuple[str, list[dict[str, str]]]:
    """The field with the question, and the turns. answered: there must be an answer.

    What `query` holds follows the question on a new line. Raises RecordError.
    """
    prompt, query, response, history = names.alpaca
    texts, field = list[str](), str(prompt)
    for column in (query, prompt):
        if (found := column.find(raw, source)) and not is_nothing(found[1]):
            field = found[0]
            texts.insert(0, text(found[1], f"{source}, {field}"))
    if not texts:
        raise RecordError(f"{source}: has no question in {prompt}; it has {', '.join(map(repr, raw))[:200]}")
    turns = []
    if (found := history.find(raw, source)) and not is_nothing(found[1]):
        if not isinstance(found[1], list):
            raise RecordError(f"{source}, {found[0]}: is {kind(found[1])}, not a list of [question, answer] pairs")
        for i, pair in enumerate(found[1]):
            where = f"{source}, {found[0]}[{i}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise RecordError(f"{where}: is {kind(pair)}, not a pair [question, answer]")
            turns += [(role, text(part, where)) for role, part in zip(("user", "assistant"), pair, strict=True)]
    turns.append(("user", "\n".join(texts)))
    if answer := response.find(raw, source):
        turns.append(("assistant", text(answer[1], f"{source}, {answer[0]}")))
    elif answered:
        raise RecordError(
            f"{source}: has no field {response} with the answer; it has {', '.join(map(repr, raw))[:200]}"
        )
    return field, [{"role": role, "content": content} for role, content in turns]
