"""What is odd about records that are used: empty answers, images in a field that is not read, names in attr that none has."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen35.config.schema import Attr
from qwen35.data.fields import FieldNames, Names
from qwen35.data.record import Record
from qwen35.errors import visible
from qwen35.wording import number_of

ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mp4", ".avi", ".mov", ".mkv", ".webm",
)  # fmt: skip
NAMED_IN_TEXT = re.compile(r"<(img|image|video|audio)>[^<>\n]{1,300}\.\w{2,5}</\1>")  # as the first Qwen-VL had it
LONGEST_PATH = 300  # characters: what is longer is a text that ends like a file's name
MOST_FIELDS = 20  # that a message names

COUNTED = {  # of what is trained as it is, how it is told: of one, of several
    "empty": ("answer", "is empty", "are empty"),
    "literal": (
        "placeholder",
        "(<image>, <video>) is text, no place",
        "(<image>, <video>) are text, no places",
    ),
    "nulls": (  # every object of the file has the same keys as its like, so it was written from a table
        "record",
        "has nulls that a table filled in; they are left out, as of a parquet file",
        "have nulls that a table filled in; they are left out, as of a parquet file",
    ),
    "tags": (
        "turn",
        "spells <tool_call> or <tool_response> out, which stays as it is; the template writes tool_calls and turns of tools",
        "spell <tool_call> or <tool_response> out, which stays as it is; the template writes tool_calls and turns of tools",
    ),
    "thoughts": (
        "thought",
        "is left out, as the chat template has it (qwen3_5 keeps those after the user's last question)",
        "are left out, as the chat template has it (qwen3_5 keeps those after the user's last question)",
    ),
    "reordered": ("tool response", "was put into the order of the calls", "were put into the order of the calls"),
}


@dataclass(frozen=True)
class RecordWarnings:
    """Of one record."""

    source: str
    counts: Mapping[str, int]  # of what is COUNTED
    unread_visuals: tuple[str, ...]  # fields that look like its image, and are not read
    unread: Sequence[tuple[str, str]]  # other fields that are not read: (where, name)


def check_record(
    raw: Mapping[str, Any],
    record: Record,
    names: FieldNames,
    unread: Sequence[tuple[str, str]],
    counts: Mapping[str, int],
) -> RecordWarnings | None:
    """raw: what became `record`; unread, counts: found on the way. None of a usual one, which costs next to nothing."""
    empty, tags, shows = 0, 0, False
    unread_visuals: tuple[str, ...] = ()
    for turn in record.turns:
        if isinstance(turn.content, tuple):
            shows = True
        elif turn.role == "user":
            if "</" in turn.content and (found := NAMED_IN_TEXT.search(turn.content)):
                unread_visuals = (f"<{found[1]}>…</{found[1]}> in a text",)
        elif turn.role == "tool":
            tags += "<tool_response>" in turn.content
        elif turn.role == "assistant":
            tags += "<tool_call>" in turn.content
            empty += not turn.tool_calls and (not turn.content or turn.content.isspace())
    if not shows:
        unread_visuals = (*(name for name in raw if _looks_like_visual(raw[name], name, names)), *unread_visuals)
    if not (empty or tags or unread_visuals or unread or any(counts.values())):
        return None
    unread = [(where, name) for where, name in unread if where != record.source or name not in unread_visuals]
    return RecordWarnings(record.source, {"empty": empty, "tags": tags, **counts}, unread_visuals, unread)


def _looks_like_visual(value: Any, name: str, names: FieldNames) -> bool:
    """Whether a field names a file that could be an image. An `id` may: many sets call a record by its image."""
    if type(value) is list and value:
        value = value[0]
    if type(value) is not str or not value[-5:].lower().endswith(ENDINGS):
        return False
    return len(value) <= LONGEST_PATH and "\n" not in value and name not in names.read | names.ignored | {"id"}


@dataclass
class DataWarnings:
    """Of the records of a file, or of several. Plain values only: the cache keeps it as JSON."""

    unseen: dict[str, str] = field(default_factory=dict)  # settings of attr -> their names, which no record has had yet
    fields: list[str] = field(default_factory=list)  # that records have; kept only as long as one is unseen
    turn_fields: list[str] = field(default_factory=list)  # those of their turns
    counts: dict[str, tuple[int, str]] = field(default_factory=dict)  # of what is COUNTED, and the first one's record
    unread_visuals: dict[str, int] = field(
        default_factory=dict
    )  # field -> records without an image that have what looks like one
    first_unread_visual: str = ""
    unread: dict[str, tuple[int, str]] = field(default_factory=dict)  # other fields -> how often, and where first

    @classmethod
    def expecting(cls, attr: Attr) -> "DataWarnings":
        """Before any record: every name in attr that is not one of the usual ones, of a field, is yet to be seen."""
        return cls({setting: own for setting, name in _named(FieldNames.of(attr)).items() if (own := name.unusual())})

    @classmethod
    def merge(cls, parts: Iterable["DataWarnings"]) -> "DataWarnings":
        parts = list(parts)
        whole = cls()
        if parts:
            whole.unseen = {s: name for s, name in parts[0].unseen.items() if all(s in part.unseen for part in parts)}
        for part in parts:
            whole.fields = list(dict.fromkeys(whole.fields + part.fields))
            whole.turn_fields = list(dict.fromkeys(whole.turn_fields + part.turn_fields))
            for name, (count, first) in part.counts.items():
                _count(whole.counts, name, count, first)
            for name, (count, first) in part.unread.items():
                _count(whole.unread, name, count, first)
            whole.first_unread_visual = whole.first_unread_visual or part.first_unread_visual
            for name, count in part.unread_visuals.items():
                whole.unread_visuals[name] = whole.unread_visuals.get(name, 0) + count
        return whole

    def check_names(self, raw: Any, names: FieldNames) -> None:
        """In one more record, whether it can be used or not; to be called as long as any is unseen."""
        if not isinstance(raw, Mapping):
            return
        entries = names.messages.any_of(raw)
        turns = [turn for turn in entries if isinstance(turn, Mapping)] if isinstance(entries, list) else []
        for setting, name in _named(names).items():
            if setting in self.unseen and any(
                name.has_own(part) for part in (turns if _is_of_turns(setting) else [raw])
            ):
                del self.unseen[setting]
        _gather(self.fields, [raw])
        _gather(self.turn_fields, turns)

    def add(self, record: RecordWarnings) -> None:
        for name, count in record.counts.items():
            if count:
                self.count(name, count, record.source)
        for where, name in record.unread:
            _count(self.unread, _path(where.removeprefix(record.source), name), 1, where)
        for name in record.unread_visuals:
            if name in self.unread_visuals or len(self.unread_visuals) < MOST_FIELDS:
                self.unread_visuals[name] = self.unread_visuals.get(name, 0) + 1
            self.first_unread_visual = self.first_unread_visual or record.source

    def count(self, name: str, count: int, source: str) -> None:
        """Of one more record what is COUNTED under that name."""
        _count(self.counts, name, count, source)

    def lines(self, mend: str = "attr.images (or .videos) says which field holds them") -> list[str]:
        """For the start of a run, and for the report of make data. mend: what is to be done about images that are not read."""
        told = []
        for name, (count, first) in self.counts.items():
            what, one, several = COUNTED[name]
            told.append(f"{number_of(count, what)} {one if count == 1 else several}; first: {first}")
        if self.unread_visuals:
            found = ", ".join(
                f"{number_of(count, 'record')} in {name!r}" for name, count in self.unread_visuals.items()
            )
            told.append(
                f"what looks like an image or video, and is not read, in records that have none: {found}; {mend}; "
                f"first: {self.first_unread_visual}"
            )
        if self.unread:
            names = [
                f"{name} ({number_of(count, 'time')}, first: {first})" for name, (count, first) in self.unread.items()
            ]
            told.append(f"fields that are not read: {', '.join(names)}")
        return [visible(line) for line in told]

    def missing_name(self, setting: str, data: str) -> str:
        """What is wrong with a name that stayed unseen in all of `data`."""
        of_turns = _is_of_turns(setting)
        fields = ", ".join(map(repr, (self.turn_fields if of_turns else self.fields)[:MOST_FIELDS]))
        what = "turn of a record" if of_turns else "record"
        return visible(
            f"data.dataset_param.attr.{setting}: no {what} of {data} has a field {self.unseen[setting]!r}; they have {fields}"
        )


def _named(names: FieldNames) -> dict[str, Names]:
    """By the settings of attr. Roles are not among them: a turn of an unknown one is an error by itself."""
    return {
        "messages": names.messages, "images": names.images, "videos": names.videos, "tools": names.tools,
        "system": names.system, "role_tag": names.role, "content_tag": names.content,
    }  # fmt: skip


def _is_of_turns(setting: str) -> bool:
    return setting in ("role_tag", "content_tag")


def _gather(fields: list[str], parts: Iterable[Mapping[str, Any]]) -> None:
    for part in parts:
        if len(fields) < MOST_FIELDS:
            fields += [name for name in map(str, part) if name not in fields]


def _path(where: str, name: str) -> str:
    """The same for all turns, items and calls: `messages[].content[].name`."""
    return re.sub(r"\[\d+\]", "[]", f"{where}.{name}").removeprefix(".").removeprefix(", ")


def _count(counts: dict[str, tuple[int, str]], name: str, count: int, first: str) -> None:
    """One more of a name, or of all the others, where there are already many."""
    if name not in counts and len(counts) >= MOST_FIELDS:
        name = "…"
    before, first_before = counts.get(name, (0, first))
    counts[name] = (before + count, first_before)
