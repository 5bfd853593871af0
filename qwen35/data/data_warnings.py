"""Counts over the records of files: those left out, and warnings about those used as they are.

Warnings cover empty answers, images in a field that is not read, fields named in attr that no
record has, special tokens that texts spell, and the like.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.config.rules import COLUMNS, SIDES
from qwen35.config.schema import TRAIN_SET
from qwen35.data.fields import FieldNames, Names, inside
from qwen35.data.record import Record, RecordError
from qwen35.errors import visible
from qwen35.wording import number_of

MEDIA_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mp4", ".avi", ".mov", ".mkv", ".webm",
)  # fmt: skip
PATH_IN_TEXT = re.compile(r"<(img|image|video|audio)>[^<>\n]{1,300}\.\w{2,5}</\1>")  # the first Qwen-VL's form
# a number above 1000 in a box or point: `"bbox_2d": [1200, …]`, `<|box_start|>(1200,…`
PIXELS = re.compile(r'(?:_2d"\s*:\s*|<\|box_start\|>)[\d\s.,()\[\]-]*?(?<![\d.])(?!1000\b)[1-9]\d{3}')
LONGEST_PATH = 300  # characters; a longer value is a text that happens to end like a file name
MAX_FIELDS = 20  # that a message names
MAX_TOKENS = 5  # that a message names
RECORD, TURN = "record", "turn of a record"  # what has the fields that attr names

COUNTED = {  # kind of warning -> (noun, words for one, words for several, what follows)
    "empty": ("answer", "is", "are", "empty"),
    "scores": ("pair", "has", "have", "no higher score of the chosen answer than of the rejected one"),
    "literal": ("placeholder", "(<image>, <video>) is", "(<image>, <video>) are", "kept as text"),
    "unfilled": ("placeholder", "(<bbox>, <ref-object>) is", "(<bbox>, <ref-object>) are",
        "kept as text, in records without objects"),
    "legacy": ("record", "has", "have", "boxes in objects, written as attr.bbox_format: legacy has them"),
    "new": ("record", "has", "have", "boxes in objects, written as attr.bbox_format: new has them"),
    "pixels": (
        "turn", "has", "have",
        "boxes with numbers above 1000: pixels, it seems, where the family writes thousandths; `objects` makes these of pixels",
    ),
    "unnamed": ("record", "has", "have",
        "input or history, read although attr names other columns alone (LLaMA-Factory reads only those that are named)"),
    "nulls": ("record", "has", "have", "nulls that a table filled in; they are dropped, as from a parquet file"),
    "tags": ("turn", "spells", "spell",
        "out <tool_call> or <tool_response>, which is kept as text; the template writes tool_calls and tool turns"),
    "thoughts": (
        "thought", "is", "are",
        "dropped, as the chat template does (qwen3_5 keeps those after the user's last question)",
    ),
    "deep": ("image", "has", "have", "more than 8 bits a channel, and all above 255 is white, as in transformers"),
    "unseen": (
        "answer", "is", "are",
        "not trained, because the conversation does not continue the prompt that the chat template writes before it",
    ),
    "split": (
        "record", "is", "are",
        "trained as several samples, each answer behind its own prompt (multi_turn: joined makes one sample of them)",
    ),
    "masked": ("answer", "is", "are", "marked to be trained, but left out by mask_history: true"),
    "frames": ("image", "has", "have", "several frames or pages, and as in transformers only the first is used"),
    "uneven": ("video", "has", "have",
        "frames at uneven times, and theirs, by the average rate as in transformers, are off by more than half a second"),
    "short": ("video", "ends", "end",
        "more than a second before the duration that its header has: cut off, or with longer sound"),
    "tools": ("record", "has", "have",
        "tools without the OpenAI API's form, as which servers pass them; they are trained in it"),
    "reordered": ("tool response", "was", "were", "moved into the order of the calls"),
}  # fmt: skip
SPELLED = {  # what became of special tokens that texts spell (Outcome in tokenizer.py) -> the message
    "control": (
        "control tokens are spelled in the text of {records}, and kept as characters "
        "(remove any that a chat template has left there)"
    ),
    "text": (
        "special tokens are spelled by user, system or tools in {records}, and kept as characters "
        "(special_tokens_in_prompts: text)"
    ),
    "token": "special tokens are spelled in the text of {records}, and each becomes one token",
}


@dataclass
class Skipped:
    """The records that `on_bad_record: skip` left out; plain values, cached as JSON."""

    kinds: dict[str, int] = field(default_factory=dict)  # kind of error -> number of records
    first: str = ""  # message of the first
    images: dict[str, str] = field(default_factory=dict)  # image file at fault -> its state at that time

    def update(self, other: "Skipped") -> None:
        for kind, count in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count
        self.first = self.first or other.first
        self.images |= other.images

    def add(self, error: RecordError) -> None:
        image = {} if error.image is None else {error.image: _state(error.image)}
        self.update(Skipped({error.kind: 1}, str(error), image))

    def __len__(self) -> int:
        return sum(self.kinds.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items(), key=lambda item: -item[1]))
        return f"{kinds}; first: {self.first}"

    def is_outdated(self) -> bool:
        """Whether an image at fault has changed since its record was left out."""
        return any(_state(image) != state for image, state in self.images.items())


def _state(image: str) -> str:
    """Changes when the file is created or replaced."""
    try:
        stat = Path(image).stat()
    except OSError:
        return "missing"
    return f"{stat.st_size} bytes, {stat.st_mtime_ns}"


@dataclass
class DataWarnings:
    """Warnings about the records of one or several files; plain values, cached as JSON."""

    # Kind -> name of a field or token, or "" -> (how often, where first). Kinds are those of
    # COUNTED and SPELLED, "visual" (unread fields that look like the image of a record
    # without any), and "unread" (other unread fields).
    counts: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    # settings in attr -> the field that they name, as long as no record has had it
    unseen: dict[str, str] = field(default_factory=dict)
    # RECORD or TURN -> the fields that any has; collected only while a setting is unseen
    fields: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def expecting(cls, names: FieldNames) -> "DataWarnings":
        """Before any record is read: all fields that attr names are unseen, but the usual ones."""
        own = {setting: name for setting, (_, name) in _by_setting(names).items()}
        return cls(unseen={s: name.own for s, name in own.items() if name.own and name.own not in name.usual})

    def update(self, other: "DataWarnings") -> None:
        """Add those about other records."""
        self.unseen = {setting: name for setting, name in self.unseen.items() if setting in other.unseen}
        for what, names in other.fields.items():
            self.fields[what] = list(dict.fromkeys(self.fields.get(what, []) + names))
        for kind, found in other.counts.items():
            for name, (count, first) in found.items():
                self.count(kind, count, first, name)

    def count_once(self, others: Iterable["DataWarnings"]) -> None:
        """Add those of several readings of one record, as often as in the one that has most."""
        most: dict[tuple[str, str], tuple[int, str]] = {}
        for kind, found in (item for other in others for item in other.counts.items()):
            for name, counted in found.items():
                most[kind, name] = max(most.get((kind, name), counted), counted, key=lambda one: one[0])
        for (kind, name), (count, source) in most.items():
            self.count(kind, count, source, name)

    def count(self, kind: str, count: int, source: str, name: str = "") -> None:
        """Beyond MAX_FIELDS names of unread fields, the others share the entry `…`."""
        found = self.counts.setdefault(kind, {})
        if kind not in SPELLED and name not in found and len(found) >= MAX_FIELDS:
            name = "…"
        before, first = found.get(name, (0, source))
        found[name] = (before + count, first)

    def count_spelled(self, spelled: Mapping[Any, Iterable[str]], source: str) -> None:
        """The special tokens that the text of one record spells, by what became of them."""
        for outcome, tokens in spelled.items():
            for name in ("", *sorted(tokens)):
                self.count(outcome, 1, source, name)

    def check_names(self, raw: Any, names: FieldNames) -> None:
        """Look for the unseen fields in a record, usable or not; call it while any is unseen."""
        if not isinstance(raw, Mapping):
            return
        values = (inside(raw, name) for name in (names.messages.own, *names.messages.usual) if name)
        entries = next((value for value in values if value is not None), None)
        turns = [turn for turn in entries if isinstance(turn, Mapping)] if isinstance(entries, list) else []
        objects = {RECORD: [raw], TURN: turns}
        for setting, (what, _) in _by_setting(names).items():
            own = self.unseen.get(setting)
            if own and any(inside(part, own) is not None for part in objects[what]):
                del self.unseen[setting]
        for what, parts in objects.items():
            found = self.fields.setdefault(what, [])
            for part in parts:
                found += [name for name in map(str, part) if name not in found and len(found) < MAX_FIELDS]

    def check_record(self, record: Record, unread: Sequence[tuple[str, str]], visuals: Sequence[str]) -> None:
        """unread, visuals: unread fields (where, name), and those of the record with an image."""
        empty = tags = pixels = 0
        for turn in record.turns:
            content = turn.content
            text = turn.text
            pixels += ("_2d" in text or "<|box_start|>" in text) and PIXELS.search(text) is not None
            if not isinstance(content, str):
                continue
            if turn.role == "assistant":
                tags += "<tool_call>" in content
                empty += not (turn.tool_calls or content.rpartition("</think>")[2].strip())
            elif turn.role == "tool":
                tags += "<tool_response>" in content
        for kind, count in (("empty", empty), ("tags", tags), ("pixels", pixels)):
            if count:
                self.count(kind, count, record.source)
        for where, name in unread:
            if where != record.source or name not in visuals:
                self.count("unread", 1, where, _field_path(where.removeprefix(record.source), name))
        for name in visuals:
            self.count("visual", 1, record.source, name)

    def lines(self, advice: str = "name their field in attr.images (or .videos)") -> list[str]:
        """The messages, for a run's start and make data; advice: what to do about unread images."""
        lines = []
        for kind, found in self.counts.items():
            if kind in COUNTED:
                noun, one, several, rest = COUNTED[kind]
                count, first = found[""]
                lines.append(f"{number_of(count, noun)} {one if count == 1 else several} {rest}; first: {first}")
        if visuals := self.counts.get("visual"):
            records = [f"{number_of(count, 'record')} in {name!r}" for name, (count, _) in visuals.items()]
            lines.append(
                f"possible images or videos that are not read, in records that have none: {', '.join(records)}; {advice}; "
                f"first: {next(iter(visuals.values()))[1]}"
            )
        if unread := self.counts.get("unread"):
            names = [f"{name} ({number_of(count, 'time')}, first: {first})" for name, (count, first) in unread.items()]
            lines.append(f"fields that are not read: {', '.join(names)}")
        for outcome, message in SPELLED.items():
            if found := self.counts.get(outcome, {}):
                count, first = found[""]
                tokens = sorted(found.keys() - {""})
                more = f" and {len(tokens) - MAX_TOKENS} more" * (len(tokens) > MAX_TOKENS)
                shown = ", ".join(tokens[:MAX_TOKENS]) + more
                lines.append(f"{message.format(records=number_of(count, 'record'))}: {shown}; first: {first}")
        return [visible(line) for line in lines]

    def missing_name(self, setting: str, data: str, section: str = f"{TRAIN_SET}.attr") -> str:
        """The message about a setting in attr whose field is still unseen after all of `data`."""
        what = TURN if setting.endswith("_tag") else RECORD
        fields = ", ".join(map(repr, self.fields.get(what, [])[:MAX_FIELDS]))
        return visible(
            f"{section}.{setting}: no {what} of {data} has a field {self.unseen[setting]!r}; they have {fields}"
        )


def unread_visuals(raw: Mapping[str, Any], record: Record, names: FieldNames) -> list[str]:
    """What looks like an image or video that is not read.

    That is a path in a text, or an unread field of a record without images and videos.
    raw: the JSON object that `record` was parsed from.
    """
    contents = [turn.content for turn in record.turns if turn.role == "user"]
    matches = [PATH_IN_TEXT.search(text) for text in contents if isinstance(text, str) and "</" in text]
    in_texts = [f"<{match[1]}>…</{match[1]}> in a text" for match in matches if match]
    fields = [] if record.visuals else [name for name in raw if _looks_like_visual(raw[name], name, names)]
    return fields + in_texts[-1:]


def _looks_like_visual(value: Any, name: str, names: FieldNames) -> bool:
    """Whether an unread field names an image or video. In `id` that is common and means nothing."""
    if type(value) is list and value:
        value = value[0]
    if type(value) is not str or not value[-5:].lower().endswith(MEDIA_SUFFIXES):
        return False
    return len(value) <= LONGEST_PATH and "\n" not in value and name not in names.read | names.ignored | {"id"}


def _by_setting(names: FieldNames) -> dict[str, tuple[str, Names]]:
    """The settings in attr that name a field; not the roles, as an unknown role is an error."""
    columns = [*zip(COLUMNS, names.alpaca, strict=True), *zip(SIDES, names.answers, strict=False)]
    of_record = {name: (RECORD, getattr(names, name)) for name in ("messages", "images", "videos", "tools", "system")}
    of_record |= {name: (RECORD, column) for name, column in columns}
    return of_record | {"role_tag": (TURN, names.role), "content_tag": (TURN, names.content)}


def _field_path(where: str, name: str) -> str:
    """The field without indices, the same for all turns and items: `messages[].content[].name`."""
    return re.sub(r"\[\d+\]", "[]", f"{where}.{name}").removeprefix(".").removeprefix(", ")
