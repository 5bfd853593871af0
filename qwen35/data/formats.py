"""Records as people bring them: LLaVA, ShareGPT, messages, content lists; with images, videos and tools or without, also mixed.

LLaVA      {"id": 7, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", …}]}
ShareGPT   {"system": "…", "conversations": [{"from": "human", …}, {"from": "function_call", …}, {"from": "observation", …}, …]}
messages   {"images": ["./a.jpg", "./b.jpg"], "messages": [{"role": "user", "content": "<image><image> Same?"}, {"role": …}]}
lists      {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "?"}]}, …]}
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from qwen35.data.content import Visuals, kind, parse_calls, parse_content, parse_tools, text
from qwen35.data.fields import SHARES, UNREAD_IN_TURNS, FieldNames, Names
from qwen35.data.folder import ImageFolder
from qwen35.data.noticed import Noticed, look
from qwen35.data.reading import read_values
from qwen35.data.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Record, RecordError, Role, Turn
from qwen35.errors import visible
from qwen35.settings import Attr
from qwen35.words import number_of

FOLLOWS = {  # what may come after which turn
    None: ("user",),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def read_records(
    file: Path,
    attr: Attr,
    images: ImageFolder,
    limit: int | None = None,
    answered: bool = True,
    skip: Callable[[RecordError], object] | None = None,
    noticed: Noticed | None = None,
) -> Iterator[Record]:
    """Of the first `limit` records of a file, in order; `answered`: each must end with an assistant turn.

    skip: is told of each record that cannot be used, which is then left out; None: the first such raises RecordError.
    noticed: gets what is odd about the others.
    """
    names = FieldNames.of(attr)
    values = read_values(file, lenient=skip is not None, is_asked_for=names.decides, noticed=noticed)
    for number, raw in enumerate(islice(values, limit), 1):
        if noticed is not None and noticed.unseen:
            noticed.look_for_names(raw, names)
        try:
            if isinstance(raw, RecordError):
                raise raw
            record = parse_record(raw, f"{file}, record {number}", names, images, answered)
        except RecordError as error:
            if skip is None:
                raise
            skip(error)
        else:
            if noticed is not None and (oddity := look(raw, record, names)):
                noticed.add(oddity)
            yield record


def parse_record(raw: Any, source: str, names: FieldNames, folder: ImageFolder, answered: bool = True) -> Record:
    """One JSON value -> Record. Raises RecordError."""
    if not isinstance(raw, dict):
        raise RecordError(f"{source}: is {kind(raw)}, not an object with messages or conversations")
    if isinstance(raw.get("id"), str | int):
        source = f"{source} (id {' '.join(str(raw['id']).split())[:80]})"
    source = visible(source)
    if unread := [name for name in names.unread if raw.get(name)]:
        raise RecordError(
            f"{source}: has {', '.join(unread)}, which are not read; training without them would be wrong"
        )
    if names.preferences and (pair := [name for name in names.preferences if raw.get(name)]):
        raise RecordError(
            f"{source}: has {' and '.join(pair)}: preference pairs are not read; attr.messages says which field holds the turns"
        )
    found = names.messages.find(raw, source)
    if found is None:
        raise RecordError(
            f"{source}: has no field {names.messages}; it has {', '.join(map(repr, raw))[:200]}; attr.messages says which one "
            "holds the turns"
        )
    field, entries = found
    between = Visuals(folder)  # the texts
    turns = _with_system(raw, source, names, _parse_turns(entries, field, source, names, between))
    _check_order(turns, field, source, answered)
    beside = Visuals(folder)
    for named, is_video in ((names.images, False), (names.videos, True)):
        if found := named.find(raw, source):
            beside.add_field(found[1], f"{source}, {found[0]}", is_video)
    asked = [turn.content for turn in turns if turn.role == "user"]
    here = f"{source}, {field}"
    _check_places(asked, "image", IMAGE_PLACEHOLDER, len(beside.images), len(between.images), here)
    _check_places(asked, "video", VIDEO_PLACEHOLDER, len(beside.videos), len(between.videos), here)
    tools = () if (found := names.tools.find(raw, source)) is None else parse_tools(found[1], f"{source}, {found[0]}")
    images, videos = between.images or beside.images, between.videos or beside.videos
    return Record(source, turns, tuple(images), tuple(videos), tools)


def _check_places(asked: list[str], what: str, placeholder: str, beside: int, between: int, where: str) -> None:
    """As many placeholders as images (or videos), named either in a field or between the texts."""
    places, wrong = (
        sum(content.count(placeholder) for content in asked),
        f"with {placeholder} that do not match the {what}s",
    )
    if beside and between:
        raise RecordError(f"{where}: {what}s between the texts and in a field of their own too; keep one", wrong)
    count = beside + between
    if count and not places:
        raise RecordError(
            f"{where}: {number_of(count, what)} but no {placeholder} in what the user says; "
            f"put one where each {what} belongs",
            wrong,
        )
    if what == "video" and places == 1 and count > 1 and beside:
        raise RecordError(
            f"{where}: 1 {placeholder} in what the user says, but {count} videos; the frames of one video are a list in the "
            "list: [[frame, frame, …]]",
            wrong,
        )
    if places != count:
        raise RecordError(f"{where}: {places} {placeholder} in what the user says, but {number_of(count, what)}", wrong)


def _with_system(raw: dict[str, Any], source: str, names: FieldNames, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """ShareGPT has the system's text in a field beside the turns."""
    found = names.system.find(raw, source)
    if found is None or found[1] == "":
        return turns
    system = text(found[1], f"{source}, {found[0]}")
    if turns[0].role == "system":
        raise RecordError(f"{source}: has a system turn and the field {found[0]} too; keep one")
    return (Turn("system", system), *turns)


def _parse_turns(raw: Any, field: str, source: str, names: FieldNames, own: Visuals) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise RecordError(f"{source}, {field}: is {kind(raw)}, not a list of turns")
    return tuple(_parse_turn(entry, f"{source}, {field}[{i}]", names, own) for i, entry in enumerate(raw))


def _parse_turn(entry: Any, where: str, names: FieldNames, own: Visuals) -> Turn:
    if not isinstance(entry, dict):
        raise RecordError(f"{where}: is {kind(entry)}, not an object")
    role_field, tag = _required(names.role, entry, where, "has no field")
    role = names.roles.get(tag) if isinstance(tag, str) else None
    if role is None:
        raise RecordError(
            f"{where}.{role_field}: {repr(tag)[:80]} is not one of {', '.join(names.roles)}; name others in attr"
        )
    _check_unread(entry, role, where)
    if tag in names.calls:
        field, value = _required(names.content, entry, where, "has no call in")
        return Turn(role, "", tool_calls=parse_calls(value, f"{where}.{field}"))
    calls = entry.get("tool_calls") or None  # parquet has the field in every turn
    if calls is not None and role != "assistant":
        raise RecordError(f"{where}: tool_calls in a turn of the {role}; only the assistant calls tools")
    parsed = () if calls is None else parse_calls(calls, f"{where}.tool_calls")
    if parsed and names.content.find(entry, where) is None:
        content = ""
    else:
        field, value = _required(names.content, entry, where, "has no text in")
        content = parse_content(value, f"{where}.{field}", role, own)
    reasoning = entry.get("reasoning_content") if role == "assistant" else None
    thought = None if reasoning is None else text(reasoning, f"{where}.reasoning_content")
    return Turn(role, content, thought, parsed)


def _check_unread(entry: dict[str, Any], role: Role, where: str) -> None:
    for name, instead in UNREAD_IN_TURNS.items():
        if entry.get(name):
            raise RecordError(f"{where}: has {name}, which is not read; {instead}")
    for name in SHARES if role == "assistant" else ():
        if entry.get(name) not in (None, 1):
            raise RecordError(
                f"{where}.{name}: {str(entry[name])[:80]} is not read; every answer is trained, or with mask_history the last"
            )


def _required(names: Names, entry: dict[str, Any], where: str, missing: str) -> tuple[str, Any]:
    found = names.find(entry, where)
    if found is None:
        raise RecordError(f"{where}: {missing} {names}")
    return found


def _check_order(turns: tuple[Turn, ...], field: str, source: str, answered: bool) -> None:
    offset = 1 if turns[0].role == "system" else 0
    before = None
    for i, turn in enumerate(turns[offset:]):
        expected = FOLLOWS[before]
        if turn.role not in expected:
            raise RecordError(
                f"{source}, {field}[{i + offset}]: a turn of the {turn.role} where one of the {expected[0]} belongs; "
                "turns are [system,] user, assistant, user, assistant, …"
            )
        before = turn.role
    if len(turns) == offset:
        raise RecordError(f"{source}, {field}: has no turn of the user")
    if answered and before != "assistant":
        raise RecordError(
            f"{source}, {field}[{len(turns) - 1}]: ends with the {before}; there is no answer to train on"
        )
