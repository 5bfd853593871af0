"""Which conversations a record is trained as, so that each answer stands behind its own prompt.

A server writes a conversation anew for each answer, and chat templates write what is history then
otherwise than what comes after the last question: Qwen3.5's and 3.6's leave out its think blocks,
which all of their prompts end with. Qwen3.8's opens with a sentence that depends on whether the
next answer is to have a thought. So answers that no single text holds behind the prompts that the
model would be given are trained in several texts: the beginnings of the record, each of which
trains those answers that it shows as their server saw them.
"""

from bisect import bisect
from dataclasses import replace

from qwen35.data.record import Record, Turn
from qwen35.data.style import Style
from qwen35.data.template import is_query, split_thought

MOST_TURNS = 50_000  # of all samples of a record: 220 questions, each with one answer


def wanted_answers(record: Record, mask_history: bool) -> list[int]:
    """The turns that are answers to be trained, as the record and mask_history have it."""
    answers = [i for i, turn in enumerate(record.turns) if turn.role == "assistant"]
    return [i for i in answers if record.turns[i].loss is not False and (not mask_history or i == answers[-1])]


def conversations(record: Record, style: Style, mask_history: bool, joined: bool) -> list[tuple[Record, Style]]:
    """The beginnings of a record, with what is trained in each, and its style: whether to think.

    Each turn is trained in one of them at most. joined: answers before the last question are
    trained where the template writes them as history. An answer before the first question has no
    prompt, and is not trained. Raises RecordError.
    """
    wanted = wanted_answers(record, mask_history)
    if style.template == "qwen3_vl_nothink" or not wanted:
        return [(record, style)]
    queries = [i for i, turn in enumerate(record.turns) if is_query(turn)]
    splits = not joined and not style.keeps_thoughts
    groups: dict[tuple[int, bool | None], list[int]] = {}
    for i in wanted:
        if splits and queries and i < queries[0]:
            continue
        following = bisect(queries, i)
        end = queries[following] if splits and following < len(queries) else len(record.turns)
        groups.setdefault((end, _thinking(record, style, i)), []).append(i)
    if not groups:
        raise record.error("nothing in it is trained, since no question precedes its answers", "nothing trained")
    if (total := sum(end for end, _ in groups)) > MOST_TURNS:
        raise record.error(
            f"its {len(queries):,} questions are {total:,} turns, as each is trained in a sample of all that precedes it, and "
            f"more than {MOST_TURNS:,} are too many: cut it, or set multi_turn: joined",
            "too many questions",
        )
    return _parts(record, style, groups)


def _thinking(record: Record, style: Style, answer: int) -> bool | None:
    """Whether a server is asked to think for an answer, if the whole text depends on it."""
    if style.enable_thinking is not None or not style.effort(True):
        return style.enable_thinking
    return bool(split_thought(record, style, answer)[0])


def _parts(
    record: Record, style: Style, groups: dict[tuple[int, bool | None], list[int]]
) -> list[tuple[Record, Style]]:
    """groups: (end, thinking) -> the answers that turns[:end] train."""
    parts, answers = [], {i for i, turn in enumerate(record.turns) if turn.role == "assistant"}
    left = set(range(len(record.turns))) - answers
    for number, ((end, thinking), mine) in enumerate(sorted(groups.items(), key=lambda group: group[1][-1]), 1):
        others = {i for i in left if i < end}
        left -= others
        turns = _masked(record, end, {*mine, *others})
        source = f"{record.source}, part {number} of {len(groups)}" if len(groups) > 1 else record.source
        parts.append((replace(record, source=source, turns=turns), replace(style, asked_to_think=thinking)))
    return parts


def _masked(record: Record, end: int, trained: set[int]) -> tuple[Turn, ...]:
    return tuple(turn if i in trained else replace(turn, loss=False) for i, turn in enumerate(record.turns[:end]))
