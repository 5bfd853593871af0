"""Warnings about records that are used as they are.

They cover empty answers, images in a field that is not read, fields named in attr that no record
has, and the like.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen35.config.schema import Attr
from qwen35.data.fields import FieldNames, Names
from qwen35.data.record import Record
from qwen35.errors import visible
from qwen35.wording import number_of

MEDIA_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mp4", ".avi", ".mov", ".mkv", ".webm",
)  # fmt: skip
PATH_IN_TEXT = re.compile(r"<(img|image|video|audio)>[^<>\n]{1,300}\.\w{2,5}</\1>")  # the first Qwen-VL's form
LONGEST_PATH = 300  # characters; a longer value is a text that happens to end like a file name
MAX_FIELDS = 20  # that a message names
TURN_SETTINGS = ("role_tag", "content_tag")  # those in attr that name a field of a turn, not of a record

COUNTED = {  # kind of warning -> (noun, message for one, message for several)
    "empty": ("answer", "is empty", "are empty"),
    "literal": ("placeholder", "(<image>, <video>) is kept as text", "(<image>, <video>) are kept as text"),
    "nulls": (
        "record",
        "has nulls that a table filled in; they are dropped, as from a parquet file",
        "have nulls that a table filled in; they are dropped, as from a parquet file",
    ),
    "tags": (
        "turn",
        "spells out <tool_call> or <tool_response>, which is kept as text; the template writes tool_calls and tool turns",
        "spell out <tool_call> or <tool_response>, which is kept as text; the template writes tool_calls and tool turns",
    ),
    "thoughts": (
        "thought",
        "is dropped, as the chat template does (qwen3_5 keeps those after the user's last question)",
        "are dropped, as the chat template does (qwen3_5 keeps those after the user's last question)",
    ),
    "reordered": ("tool response", "was moved into the order of the calls", "were moved into the order of the calls"),
}


@dataclass(frozen=True)
class RecordWarnings:
    """Warnings about one record."""

    source: str
    counts: Mapping[str, int]  # by the kinds in COUNTED
    unread_visuals: tuple[str, ...]  # unread fields that look like the record's image
    unread: Sequence[tuple[str, str]]  # other unread fields: (where, name)


def check_record(
    raw: Mapping[str, Any],
    record: Record,
    names: FieldNames,
    unread: Sequence[tuple[str, str]],
    counts: Mapping[str, int],
) -> RecordWarnings | None:
    """The warnings about a record; None for most records, quickly.

    raw: the JSON object that `record` was parsed from; unread, counts: what the parser found.
    """
    empty, tags, has_visuals = 0, 0, False
    unread_visuals: tuple[str, ...] = ()
    for turn in record.turns:
        if isinstance(turn.content, tuple):
            has_visuals = True
        elif turn.role == "user":
            if "</" in turn.content and (match := PATH_IN_TEXT.search(turn.content)):
                unread_visuals = (f"<{match[1]}>…</{match[1]}> in a text",)
        elif turn.role == "tool":
            tags += "<tool_response>" in turn.content
        elif turn.role == "assistant":
            tags += "<tool_call>" in turn.content
            empty += not turn.tool_calls and (not turn.content or turn.content.isspace())
    if not has_visuals:
        unread_visuals = (*(name for name in raw if _looks_like_visual(raw[name], name, names)), *unread_visuals)
    if not (empty or tags or unread_visuals or unread or any(counts.values())):
        return None
    unread = [(where, name) for where, name in unread if where != record.source or name not in unread_visuals]
    return RecordWarnings(record.source, {"empty": empty, "tags": tags, **counts}, unread_visuals, unread)


def _looks_like_visual(value: Any, name: str, names: FieldNames) -> bool:
    """Whether an unread field names an image or video. In `id` that is common and means nothing."""
    if type(value) is list and value:
        value = value[0]
    if type(value) is not str or not value[-5:].lower().endswith(MEDIA_SUFFIXES):
        return False
    return len(value) <= LONGEST_PATH and "\n" not in value and name not in names.read | names.ignored | {"id"}


@dataclass
class DataWarnings:
    """Warnings about the records of one or several files; plain values, cached as JSON."""

    # settings in attr -> the field that they name, as long as no record has had it
    unseen: dict[str, str] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)  # of the records; collected only while a setting is unseen
    turn_fields: list[str] = field(default_factory=list)  # of their turns
    counts: dict[str, tuple[int, str]] = field(default_factory=dict)  # kind in COUNTED -> (count, first source)
    # unread field that looks like an image -> number of records that have it and no image
    unread_visuals: dict[str, int] = field(default_factory=dict)
    first_unread_visual: str = ""
    unread: dict[str, tuple[int, str]] = field(default_factory=dict)  # other unread field -> (count, first source)

    @classmethod
    def expecting(cls, attr: Attr) -> "DataWarnings":
        """Before any record is read: all fields that attr names are unseen, but the usual ones."""
        names = _by_setting(FieldNames.of(attr))
        return cls({setting: own for setting, name in names.items() if (own := name.unusual())})

    @classmethod
    def merge(cls, parts: Iterable["DataWarnings"]) -> "DataWarnings":
        parts = list(parts)
        merged = cls()
        if parts:
            merged.unseen = {s: name for s, name in parts[0].unseen.items() if all(s in part.unseen for part in parts)}
        for part in parts:
            merged.fields = list(dict.fromkeys(merged.fields + part.fields))
            merged.turn_fields = list(dict.fromkeys(merged.turn_fields + part.turn_fields))
            for name, (count, first) in part.counts.items():
                _add_count(merged.counts, name, count, first)
            for name, (count, first) in part.unread.items():
                _add_count(merged.unread, name, count, first)
            merged.first_unread_visual = merged.first_unread_visual or part.first_unread_visual
            for name, count in part.unread_visuals.items():
                merged.unread_visuals[name] = merged.unread_visuals.get(name, 0) + count
        return merged

    def check_names(self, raw: Any, names: FieldNames) -> None:
        """Look for the unseen fields in a record, usable or not; call it while any is unseen."""
        if not isinstance(raw, Mapping):
            return
        entries = names.messages.any_of(raw)
        turns = [turn for turn in entries if isinstance(turn, Mapping)] if isinstance(entries, list) else []
        for setting, name in _by_setting(names).items():
            objects = turns if setting in TURN_SETTINGS else [raw]
            if setting in self.unseen and any(map(name.has_own, objects)):
                del self.unseen[setting]
        _collect(self.fields, [raw])
        _collect(self.turn_fields, turns)

    def add(self, record: RecordWarnings) -> None:
        for name, count in record.counts.items():
            if count:
                self.count(name, count, record.source)
        for where, name in record.unread:
            _add_count(self.unread, _field_path(where.removeprefix(record.source), name), 1, where)
        for name in record.unread_visuals:
            if name in self.unread_visuals or len(self.unread_visuals) < MAX_FIELDS:
                self.unread_visuals[name] = self.unread_visuals.get(name, 0) + 1
            self.first_unread_visual = self.first_unread_visual or record.source

    def count(self, kind: str, count: int, source: str) -> None:
        """Add what one record counts of a kind in COUNTED."""
        _add_count(self.counts, kind, count, source)

    def lines(self, advice: str = "name their field in attr.images (or .videos)") -> list[str]:
        """The messages, for a run's start and make data; advice: what to do about unread images."""
        lines = []
        for kind, (count, first) in self.counts.items():
            noun, one, several = COUNTED[kind]
            lines.append(f"{number_of(count, noun)} {one if count == 1 else several}; first: {first}")
        if self.unread_visuals:
            records = [f"{number_of(count, 'record')} in {name!r}" for name, count in self.unread_visuals.items()]
            lines.append(
                f"possible images or videos that are not read, in records that have none: {', '.join(records)}; {advice}; "
                f"first: {self.first_unread_visual}"
            )
        if self.unread:
            names = [
                f"{name} ({number_of(count, 'time')}, first: {first})" for name, (count, first) in self.unread.items()
            ]
            lines.append(f"fields that are not read: {', '.join(names)}")
        return [visible(line) for line in lines]

    def missing_name(self, setting: str, data: str) -> str:
        """The message about a setting in attr whose field is still unseen after all of `data`."""
        of_turns = setting in TURN_SETTINGS
        fields = ", ".join(map(repr, (self.turn_fields if of_turns else self.fields)[:MAX_FIELDS]))
        what = "turn of a record" if of_turns else "record"
        return visible(
            f"data.dataset_param.attr.{setting}: no {what} of {data} has a field {self.unseen[setting]!r}; they have {fields}"
        )


def _by_setting(names: FieldNames) -> dict[str, Names]:
    """The settings in attr that name a field; not the roles, as an unknown role is an error."""
    return {
        "messages": names.messages, "images": names.images, "videos": names.videos, "tools": names.tools,
        "system": names.system, "role_tag": names.role, "content_tag": names.content,
    }  # fmt: skip


def _collect(fields: list[str], objects: Iterable[Mapping[str, Any]]) -> None:
    for part in objects:
        if len(fields) < MAX_FIELDS:
            fields += [name for name in map(str, part) if name not in fields]


def _field_path(where: str, name: str) -> str:
    """The field without indices, the same for all turns and items: `messages[].content[].name`."""
    return re.sub(r"\[\d+\]", "[]", f"{where}.{name}").removeprefix(".").removeprefix(", ")


def _add_count(counts: dict[str, tuple[int, str]], name: str, count: int, first: str) -> None:
    """Add to the count of a name; beyond MAX_FIELDS names, the others share the entry `…`."""
    if name not in counts and len(counts) >= MAX_FIELDS:
        name = "…"
    before, first_before = counts.get(name, (0, first))
    counts[name] = (before + count, first_before)
