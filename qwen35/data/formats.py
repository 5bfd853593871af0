"""Records as people bring them: LLaVA, ShareGPT, messages, content lists; with images, videos and tools or without, also mixed.

LLaVA      {"id": 7, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", …}]}
ShareGPT   {"system": "…", "conversations": [{"from": "human", …}, {"from": "function_call", …}, {"from": "observation", …}, …]}
messages   {"images": ["./a.jpg", "./b.jpg"], "messages": [{"role": "user", "content": "<image><image> Same?"}, {"role": …}]}
lists      {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "?"}]}, …]}
masks      {"messages": [{"role": "user", …}, {"role": "assistant", …, "loss_mask": 0}, …]}, or "loss_mask": [0, 0, …] beside
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from qwen35.config.schema import Attr
from qwen35.data.content import Parser, Placeholder, kind, parse_tools, text
from qwen35.data.data_warnings import DataWarnings, RecordWarnings, check_record
from qwen35.data.fields import FieldNames, is_nothing
from qwen35.data.folder import ImageFolder
from qwen35.data.readers import read_values
from qwen35.data.record import (
    IMAGE_PLACEHOLDER,
    PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    Record,
    RecordError,
    Turn,
    Video,
    Visual,
    content_of,
    with_visuals,
)
from qwen35.data.turns import parse_turns
from qwen35.errors import visible
from qwen35.wording import number_of

SHOWING = ("user", "tool")  # whose turns may have images and videos: the chat template writes them there


def read_records(
    file: Path,
    attr: Attr,
    images: ImageFolder,
    limit: int | None = None,
    answered: bool = True,
    skip: Callable[[RecordError], object] | None = None,
    warnings: DataWarnings | None = None,
) -> Iterator[Record]:
    """Of the first `limit` records of a file, in order; `answered`: each must end with an assistant turn.

    skip: is told of each record that cannot be used, which is then left out; None: the first such raises RecordError.
    warnings: gets what is odd about the others.
    """
    names = FieldNames.of(attr)
    values = read_values(file, lenient=skip is not None, is_asked_for=names.decides, warnings=warnings)
    for number, raw in enumerate(islice(values, limit), 1):
        if warnings is not None and warnings.unseen:
            warnings.check_names(raw, names)
        try:
            if isinstance(raw, RecordError):
                raise raw
            record, record_warnings = parse_record(raw, f"{file}, record {number}", names, images, answered)
        except RecordError as error:
            if skip is None:
                raise
            skip(error)
        else:
            if warnings is not None and record_warnings is not None:
                warnings.add(record_warnings)
            yield record


def parse_record(
    raw: Any, source: str, names: FieldNames, folder: ImageFolder, answered: bool = True
) -> tuple[Record, RecordWarnings | None]:
    """One JSON value -> Record, and what is odd about it. Raises RecordError."""
    if not isinstance(raw, dict):
        raise RecordError(f"{source}: is {kind(raw)}, not an object with messages or conversations")
    if isinstance(raw.get("id"), str | int):
        source = f"{source} (id {' '.join(str(raw['id']).split())[:80]})"
    source = visible(source)
    parser = Parser(folder, names.ignored)
    parser.check(raw, names.of_record, source)
    found = names.messages.find(raw, source)
    if found is None:
        raise RecordError(
            f"{source}: has no field {names.messages}; it has {', '.join(map(repr, raw))[:200]}; attr.messages says which one "
            "holds the turns"
        )
    field, entries = found
    here = f"{source}, {field}"
    masks = None if "loss_mask" in names.ignored else raw.get("loss_mask")
    parsed, reordered = parse_turns(entries, here, names, parser, masks, answered)
    beside: dict[str, list[Visual]] = {IMAGE_PLACEHOLDER: [], VIDEO_PLACEHOLDER: []}
    for placeholder, named in ((IMAGE_PLACEHOLDER, names.images), (VIDEO_PLACEHOLDER, names.videos)):
        if found := named.find(raw, source):
            beside[placeholder] = parser.visuals(found[1], f"{source}, {found[0]}", placeholder == VIDEO_PLACEHOLDER)
    turns, literal = _with_visuals(parsed, beside, here)
    turns = _with_system(raw, source, names, turns)
    tools = () if (found := names.tools.find(raw, source)) is None else parse_tools(found[1], f"{source}, {found[0]}")
    record = Record(source, turns, tools)
    warnings = check_record(raw, record, names, parser.unread, {"literal": literal, "reordered": reordered})
    unread_visuals = (
        () if warnings is None else [name for name in warnings.unread_visuals if name not in names.of_record.known]
    )
    if literal and unread_visuals:
        raise RecordError(
            f"{here}: <image> or <video>, and nothing to show there, but {unread_visuals[0]} looks like it; "
            "attr.images (or .videos) says which field holds it; what is text belongs in a content list"
        )
    return record, warnings


def _with_visuals(
    turns: Sequence[Turn], beside: Mapping[str, list[Visual]], where: str
) -> tuple[tuple[Turn, ...], int]:
    """The turns with their images and videos, and how many placeholders are text. Raises RecordError.

    beside: those of the record's own fields, by their placeholder. In a plain text a placeholder is a place only if the record
    has something to show; in a list of texts, images and videos all text is text.
    """
    parts: list[Any] = [part for turn in turns if type(turn.content) is tuple for part in turn.content]
    left: dict[str, Iterator[Visual]] = {}
    if parts or any(beside.values()):
        plain = "\n".join([turn.content for turn in turns if isinstance(turn.content, str) and turn.role in SHOWING])
        for placeholder, visuals in beside.items():
            between = sum(isinstance(part, Video if placeholder == VIDEO_PLACEHOLDER else Path) for part in parts)
            bare = parts.count(Placeholder(placeholder))
            if visuals or between or bare:
                places = between + bare + plain.count(placeholder)
                _check_places(placeholder, places, len(visuals), between, where)
                left[placeholder] = iter(visuals)
    whole, literal = [], 0
    for turn in turns:
        content: Any = turn.content
        if type(content) is tuple:
            content = content_of(next(left[part.tag]) if isinstance(part, Placeholder) else part for part in content)
        elif IMAGE_PLACEHOLDER in content or VIDEO_PLACEHOLDER in content:
            visible = left if turn.role in SHOWING else {}
            literal += sum(placeholder not in visible for placeholder in PLACEHOLDER.findall(content))
            content = with_visuals(content, visible)
        if content is not turn.content:  # dataclasses.replace takes ten times as long
            turn = Turn(turn.role, content, turn.reasoning, turn.tool_calls, turn.loss, turn.tool_call_id)
        whole.append(turn)
    return tuple(whole), literal


def _check_places(placeholder: str, places: int, beside: int, between: int, where: str) -> None:
    """As many placeholders as images (or videos), named either in a field or between the texts."""
    if places == beside + between and not (beside and between):
        return
    what, wrong = placeholder[1:-1], f"with {placeholder} that do not match the {placeholder[1:-1]}s"
    if beside and between:
        raise RecordError(f"{where}: {what}s between the texts and in a field of their own too; keep one", wrong)
    count = beside + between
    if count and not places:
        raise RecordError(
            f"{where}: {number_of(count, what)} but no {placeholder} in what the user and tools say; "
            f"put one where each {what} belongs",
            wrong,
        )
    said = f"{places} {placeholder} in what the user and tools say, but {number_of(count, what)}"
    if what == "video" and places == 1 and beside > 1:
        said += "; the frames of one video are a list in the list: [[frame, frame, …]]"
    if count and places > count:
        said += "; one that is text belongs in a content list, where all text is text"
    raise RecordError(f"{where}: {said}", wrong)


def _with_system(raw: dict[str, Any], source: str, names: FieldNames, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """ShareGPT has the system's text in a field beside the turns."""
    found = names.system.find(raw, source)
    if found is None or is_nothing(found[1]):
        return turns
    system = text(found[1], f"{source}, {found[0]}")
    if turns[0].role == "system":
        raise RecordError(f"{source}: has a system turn and the field {found[0]} too; keep one")
    return (Turn("system", system), *turns)
