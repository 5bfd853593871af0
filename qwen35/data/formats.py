"""Parses records in the usual formats, with or without images, videos and tools.

A file may mix the formats:

LLaVA      {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What?"}, …]}
ShareGPT   {"system": "…", "conversations": [{"from": "human", …}, {"from": "function_call", …}, …]}
messages   {"images": ["./a.jpg"], "messages": [{"role": "user", "content": "<image> What?"}, …]}
lists      {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, …]}, …]}
masks      {"messages": [{"role": "assistant", …, "loss_mask": 0}, …]}, or a list beside messages
boxes      {"images": ["./a.jpg"], "messages": […], "objects": {"ref": ["cat"], "bbox": [[1, 2]]}}

or, with attr.format: alpaca, has this one:

Alpaca     {"instruction": "…", "input": "…", "output": "…", "history": [["…", "…"], …]}

Those of preference pairs are in preference.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from qwen35.config.schema import Attr
from qwen35.data.alpaca import alpaca_turns
from qwen35.data.content import Parser, Placeholder, kind, parse_tools, text
from qwen35.data.data_warnings import DataWarnings, unread_visuals
from qwen35.data.fields import FieldNames, is_nothing
from qwen35.data.grounding import literal_tags, with_objects
from qwen35.data.media import ImageFolder
from qwen35.data.preference import Side, is_scored_otherwise, pair_turns, paired
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

VISUAL_ROLES = ("user", "tool")  # the chat template writes images and videos only in their turns


def read_records(
    file: Path,
    attr: Attr,
    images: ImageFolder,
    limit: int | None = None,
    answered: bool = True,
    skip: Callable[[RecordError], object] | None = None,
    warnings: DataWarnings | None = None,
    pairs: bool = False,
) -> Iterator[Record]:
    """The first `limit` records of a file, in order.

    answered: each must end with an assistant turn. skip: called with the error of each unusable
    record, which is left out; None: the first is raised. warnings: collects those on used records.
    pairs: each is a preference pair.
    """
    names = FieldNames.of(attr, pairs)
    warnings = DataWarnings() if warnings is None else warnings
    values = read_values(file, lenient=skip is not None, needs_column=names.needs_value, warnings=warnings)
    yield from parse_records(islice(values, limit), file, 1, names, images, warnings, answered, skip)


def parse_records(
    values: Iterable[Any],
    file: Path,
    first: int,
    names: FieldNames,
    images: ImageFolder,
    warnings: DataWarnings,
    answered: bool = True,
    skip: Callable[[RecordError], object] | None = None,
) -> Iterator[Record]:
    """The records of a file's values from number `first` on; as `read_records`."""
    for number, raw in enumerate(values, first):
        if warnings.unseen:
            warnings.check_names(raw, names)
        try:
            if isinstance(raw, RecordError):
                raise raw
            yield parse_record(raw, f"{file}, record {number}", names, images, warnings, answered)
        except RecordError as error:
            if skip is None:
                raise
            skip(error)


def parse_record(
    raw: Any, source: str, names: FieldNames, folder: ImageFolder, warnings: DataWarnings, answered: bool = True
) -> Record:
    """One JSON value -> the record, counted in `warnings` if it can be used. Raises RecordError."""
    if not isinstance(raw, dict):
        raise RecordError(f"{source}: is {kind(raw)}, not an object with messages or conversations")
    if isinstance(raw.get("id"), str | int):
        source = f"{source} (id {' '.join(str(raw['id']).split())[:80]})"
    source = visible(source)
    parser = Parser(folder, names.ignored)
    parser.check(raw, names.of_record, source)
    if not names.answers:
        side = alpaca_turns(raw, names, source, answered) if names.is_alpaca else _entries(raw, names, source)
        return _conversation(raw, side, source, names, parser, warnings, answered)
    chosen, rejected = pair_turns(raw, names, source)
    counts, parsers = (DataWarnings(), DataWarnings()), (parser, Parser(folder, names.ignored))
    pair = paired(
        _conversation(raw, chosen, source, names, parsers[0], counts[0], answered),
        _conversation(raw, rejected, source, names, parsers[1], counts[1], answered),
    )
    warnings.count_once(counts)
    if is_scored_otherwise(raw):
        warnings.count("scores", 1, source)
    return pair


def _conversation(
    raw: dict[str, Any],
    side: Side,
    source: str,
    names: FieldNames,
    parser: Parser,
    warnings: DataWarnings,
    answered: bool,
) -> Record:
    """The record with the turns of `side`, and all else from `raw`. Raises RecordError."""
    field, entries = side
    turns_source = f"{source}, {field}"
    loss_mask = None if "loss_mask" in names.ignored else raw.get("loss_mask")
    parsed, reordered = parse_turns(entries, turns_source, names, parser, loss_mask, answered)
    visuals: dict[str, list[Visual]] = {IMAGE_PLACEHOLDER: [], VIDEO_PLACEHOLDER: []}
    for placeholder, field_names in ((IMAGE_PLACEHOLDER, names.images), (VIDEO_PLACEHOLDER, names.videos)):
        if found := field_names.find(raw, source):
            visuals[placeholder] = parser.visuals(found[1], f"{source}, {found[0]}", placeholder == VIDEO_PLACEHOLDER)
    turns, literal = _with_visuals(parsed, visuals, turns_source)
    turns = _with_system(raw, source, names, turns)
    found = names.tools.find(raw, source)
    tools, reshaped = ((), False) if found is None else parse_tools(found[1], f"{source}, {found[0]}")
    record = Record(source, turns, tools)
    has_boxes = "objects" in names.fixed and not is_nothing(raw.get("objects"))
    if has_boxes:
        record = with_objects(record, raw["objects"], f"{source}, objects", names.bbox_format)
    unread = unread_visuals(raw, record, names)
    candidates = [name for name in unread if name not in names.of_record.known]
    if literal and candidates:
        raise RecordError(
            f"{turns_source}: has <image> or <video> but no image or video; {candidates[0]} looks like one: name its field in "
            "attr.images (or .videos); if the placeholder is plain text, put it in a content list"
        )
    boxes = (names.bbox_format, 1) if has_boxes else ("unfilled", literal_tags(record))
    unnamed = ("unnamed", int(names.is_alpaca and names.reads_unnamed(raw)))
    for what, count in (("literal", literal), ("reordered", reordered), ("tools", int(reshaped)), unnamed, boxes):
        if count:
            warnings.count(what, count, record.source)
    warnings.check_record(record, parser.unread, unread)
    return record


def _entries(raw: dict[str, Any], names: FieldNames, source: str) -> tuple[str, Any]:
    """(field, value) of the turns. Raises RecordError."""
    if found := names.messages.find(raw, source):
        return found
    advice = "name the one that holds the turns in attr.messages"
    if "instruction" in raw:
        advice = "Alpaca's fields are read with attr.format: alpaca, or format: alpaca of an entry in dataset"
    raise RecordError(f"{source}: has no field {names.messages}; it has {', '.join(map(repr, raw))[:200]}; {advice}")


def _with_visuals(
    turns: Sequence[Turn], record_visuals: Mapping[str, list[Visual]], where: str
) -> tuple[tuple[Turn, ...], int]:
    """The turns with their images and videos, and how many placeholders are plain text.

    record_visuals: those in the record's own fields, by placeholder. `<image>` in a string
    is a placeholder only if the record has images; in a content list it is always text.
    Raises RecordError.
    """
    parts: list[Any] = [part for turn in turns if type(turn.content) is tuple for part in turn.content]
    remaining: dict[str, Iterator[Visual]] = {}
    if parts or any(record_visuals.values()):
        contents = [turn.content for turn in turns if turn.role in VISUAL_ROLES]
        plain = "\n".join([content for content in contents if isinstance(content, str)])
        for placeholder, visuals in record_visuals.items():
            in_content = sum(isinstance(part, Video if placeholder == VIDEO_PLACEHOLDER else Path) for part in parts)
            empty_items = parts.count(Placeholder(placeholder))
            if visuals or in_content or empty_items:
                placeholders = in_content + empty_items + plain.count(placeholder)
                _check_placeholders(placeholder, placeholders, len(visuals), in_content, where)
                remaining[placeholder] = iter(visuals)
    filled, literal = [], 0
    for turn in turns:
        content: Any = turn.content
        if type(content) is tuple:
            content = content_of(
                next(remaining[part.tag]) if isinstance(part, Placeholder) else part for part in content
            )
        elif IMAGE_PLACEHOLDER in content or VIDEO_PLACEHOLDER in content:
            usable = remaining if turn.role in VISUAL_ROLES else {}
            literal += sum(placeholder not in usable for placeholder in PLACEHOLDER.findall(content))
            content = with_visuals(content, usable)
        if content is not turn.content:  # dataclasses.replace takes ten times as long
            turn = Turn(turn.role, content, turn.reasoning, turn.tool_calls, turn.loss, turn.tool_call_id)
        filled.append(turn)
    return tuple(filled), literal


def _check_placeholders(placeholder: str, placeholders: int, in_fields: int, in_content: int, where: str) -> None:
    """Raises RecordError unless each image (or video) has a placeholder, all given in one way."""
    if placeholders == in_fields + in_content and not (in_fields and in_content):
        return
    what, kind_of_error = placeholder[1:-1], f"with {placeholder} that do not match the {placeholder[1:-1]}s"
    if in_fields and in_content:
        raise RecordError(
            f"{where}: has {what}s in content lists and in a field of the record; keep one", kind_of_error
        )
    count = in_fields + in_content
    if count and not placeholders:
        raise RecordError(
            f"{where}: {number_of(count, what)} but no {placeholder} in the user and tool turns; "
            f"put one where each {what} belongs",
            kind_of_error,
        )
    message = f"{placeholders} {placeholder} in the user and tool turns, but {number_of(count, what)}"
    if what == "video" and placeholders == 1 and in_fields > 1:
        message += "; write the frames of one video as a list inside the list: [[frame, frame, …]]"
    if count and placeholders > count:
        message += "; one that is plain text belongs in a content list"
    raise RecordError(f"{where}: {message}", kind_of_error)


def _with_system(raw: dict[str, Any], source: str, names: FieldNames, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Put the system prompt before the turns; ShareGPT has it in a field of the record."""
    found = names.system.find(raw, source)
    if found is None or is_nothing(found[1]):
        return turns
    system = text(found[1], f"{source}, {found[0]}")
    if turns[0].role == "system":
        raise RecordError(f"{source}: has both a system turn and the field {found[0]}; keep one")
    return (Turn("system", system), *turns)
