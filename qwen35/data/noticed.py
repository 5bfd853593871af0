"""What is odd about records that are used: empty answers, images in a field that is not read, names in attr that none has."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen35.data.fields import FieldNames, Names
from qwen35.data.record import Record
from qwen35.errors import visible
from qwen35.settings import Attr
from qwen35.words import number_of

ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mp4", ".avi", ".mov", ".mkv", ".webm",
)  # fmt: skip
LONGEST_PATH = 300  # characters: what is longer is a text that ends like a file's name
MOST_FIELDS = 20  # that a message names


@dataclass(frozen=True)
class Oddity:
    """Of one record."""

    source: str
    empty_answers: int
    strays: tuple[str, ...]  # fields that look like its image, and are not read


def look(raw: Mapping[str, Any], record: Record, names: FieldNames) -> Oddity | None:
    """raw: what became `record`. None of a usual one, which costs next to nothing."""
    empty = 0
    for turn in record.turns:
        if turn.role == "assistant" and not turn.tool_calls and (not turn.content or turn.content.isspace()):
            empty += 1
    strays = () if record.images or record.videos else tuple(name for name in raw if _is_stray(raw[name], name, names))
    return Oddity(record.source, empty, strays) if empty or strays else None


def _is_stray(value: Any, name: str, names: FieldNames) -> bool:
    """Whether a field names a file that could be an image. An `id` may: many sets call a record by its image."""
    if type(value) is list and value:
        value = value[0]
    if type(value) is not str or not value[-5:].lower().endswith(ENDINGS):
        return False
    return len(value) <= LONGEST_PATH and "\n" not in value and name != "id" and name not in names.read


@dataclass
class Noticed:
    """Of the records of a file, or of several. Plain values only: the cache keeps it as JSON."""

    unseen: dict[str, str] = field(default_factory=dict)  # settings of attr -> their names, which no record has had yet
    fields: list[str] = field(default_factory=list)  # that records have; kept only as long as one is unseen
    turn_fields: list[str] = field(default_factory=list)  # those of their turns
    empty_answers: int = 0
    first_empty: str = ""  # its record
    strays: dict[str, int] = field(
        default_factory=dict
    )  # field -> records without an image that have what looks like one
    first_stray: str = ""
    aligned_nulls: int = 0  # records of JSON that was made from a table, of whose objects nulls were left out
    first_aligned: str = ""

    @classmethod
    def before(cls, attr: Attr) -> "Noticed":
        """Before any record: every name in attr that is not one of the usual ones, of a field, is yet to be seen."""
        return cls({setting: own for setting, name in _named(FieldNames.of(attr)).items() if (own := name.unusual())})

    @classmethod
    def together(cls, parts: Iterable["Noticed"]) -> "Noticed":
        parts = list(parts)
        whole = cls()
        if parts:
            whole.unseen = {s: name for s, name in parts[0].unseen.items() if all(s in part.unseen for part in parts)}
        for part in parts:
            whole.fields = list(dict.fromkeys(whole.fields + part.fields))
            whole.turn_fields = list(dict.fromkeys(whole.turn_fields + part.turn_fields))
            whole.empty_answers += part.empty_answers
            whole.first_empty = whole.first_empty or part.first_empty
            whole.first_stray = whole.first_stray or part.first_stray
            whole.aligned_nulls += part.aligned_nulls
            whole.first_aligned = whole.first_aligned or part.first_aligned
            for name, count in part.strays.items():
                whole.strays[name] = whole.strays.get(name, 0) + count
        return whole

    def look_for_names(self, raw: Any, names: FieldNames) -> None:
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

    def add(self, oddity: Oddity) -> None:
        if oddity.empty_answers:
            self.empty_answers += oddity.empty_answers
            self.first_empty = self.first_empty or oddity.source
        for name in oddity.strays:
            if name in self.strays or len(self.strays) < MOST_FIELDS:
                self.strays[name] = self.strays.get(name, 0) + 1
            self.first_stray = self.first_stray or oddity.source

    def add_nulls(self, source: str) -> None:
        """Of one more record."""
        self.aligned_nulls += 1
        self.first_aligned = self.first_aligned or source

    def lines(self, mend: str = "attr.images (or .videos) says which field holds them") -> list[str]:
        """For the start of a run, and for the report of make data. mend: what is to be done about images that are not read."""
        told = []
        if self.empty_answers:
            answers = f"{number_of(self.empty_answers, 'answer')} {'is' if self.empty_answers == 1 else 'are'} empty"
            told.append(f"{answers}; first: {self.first_empty}")
        if self.strays:
            found = ", ".join(f"{number_of(count, 'record')} in {name!r}" for name, count in self.strays.items())
            told.append(
                f"what looks like an image or video, and is not read, in records that have none: {found}; {mend}; "
                f"first: {self.first_stray}"
            )
        if self.aligned_nulls:
            told.append(
                f"nulls in {number_of(self.aligned_nulls, 'record')} are left out, as of a parquet file: every object of the "
                f"file has the same keys as its like, so it was written from a table; first: {self.first_aligned}"
            )
        return [visible(line) for line in told]

    def unread(self, setting: str, data: str) -> str:
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
