"""Records as people bring them: JSON list or JSON lines, LLaVA or messages, with images or without, also mixed.

LLaVA      {"id": 7, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", …}]}
messages   {"images": ["./a.jpg", "./b.jpg"], "messages": [{"role": "user", "content": "<image><image> Same?"}, …]}
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from qwen35.errors import SettingError, UserError, one_line
from qwen35.settings import Attr

Role = Literal["system", "user", "assistant"]
Names = tuple[str | None, ...]  # the name that attr gives, which comes first, and the usual ones
IMAGE_PLACEHOLDER = "<image>"
MISCOUNTED = "with <image> that do not match the images"
UNREAD = ("videos", "video", "audios", "audio", "tools", "system")  # fields that others read


class RecordError(UserError):
    """One line that names the file, the record (from 1, with its id if it has one) and the field."""

    def __init__(self, message: str, kind: str = "malformed", image: str | None = None):
        """kind: in two or three words what is wrong; image: the file that made the record a bad one."""
        super().__init__(message)
        self.kind, self.image = kind, image


@dataclass(frozen=True)
class Turn:
    role: Role
    content: str
    reasoning: str | None = None  # `reasoning_content` of an assistant turn


@dataclass(frozen=True)
class Record:
    source: str  # "data/a.json, record 12 (id 7)", for messages
    turns: tuple[Turn, ...]  # [system,] user, assistant, user, …
    images: tuple[Path, ...] = ()  # one for each `<image>` in the user turns, in order

    def error(self, message: str, kind: str = "malformed", image: str | None = None) -> RecordError:
        return RecordError(f"{self.source}: {message}", kind, image)


@dataclass(frozen=True)
class FieldNames:
    """Where a record keeps what."""

    messages: Names
    images: Names
    role: Names
    content: Names
    roles: dict[str, Role]

    @classmethod
    def of(cls, attr: Attr) -> "FieldNames":
        roles: dict[str, Role] = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
        roles["system"] = "system"
        own: tuple[tuple[str | None, Role], ...] = (
            (attr.system_tag, "system"),
            (attr.user_tag, "user"),
            (attr.assistant_tag, "assistant"),
        )
        roles |= {tag: role for tag, role in own if tag}
        return cls(
            (attr.messages, "messages", "conversations"),
            (attr.images, "images", "image"),
            (attr.role_tag, "role", "from"),
            (attr.content_tag, "content", "value"),
            roles,
        )


class ImageFolder:
    """Turns the path in a record into a real one, which must lie below `root` (dataset_dir), links followed."""

    def __init__(self, root: str | Path):
        """Raises SettingError if there is no such folder."""
        if not Path(root).is_dir():
            raise SettingError(f"dataset_dir: {root}: no such folder; it is where the records' images lie")
        self.root = str(root)
        self.real_root = _real(root)
        self._real_folders: dict[Path, Path] = {}  # following links is slow on a network disk: once a folder

    def path(self, name: str) -> Path:
        """Raises ValueError if `name` leaves the folder, OSError if it is no name. Does not ask for the file to be there."""
        if "\0" in name:
            raise ValueError("has a NUL character")
        path = self.real_root / name
        if path.name in {"", ".."}:
            raise ValueError(f"{name!r} is not a file name")
        folder = path.parent
        if folder not in self._real_folders:
            self._real_folders[folder] = _real(folder)
        path = self._real_folders[folder] / path.name
        if path.is_symlink():
            path = _real(path)
        if not path.is_relative_to(self.real_root):
            raise ValueError(f"{name!r} lies outside dataset_dir {self.root}")
        return path


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, lets a loop of links be


def dataset_files(dataset: str) -> list[Path]:
    """The files of a comma-separated list, as given or below the working folder. Raises SettingError if one is missing."""
    files = [Path(name.strip()) for name in dataset.split(",") if name.strip()]
    setting = "data.dataset_param.basic_parameters.dataset"
    if not files:
        raise SettingError(f"{setting} names no file")
    for file in files:
        if file.is_dir():
            raise SettingError(f"{setting}: {file}: is a folder; name the files in it, with commas between them")
        if not file.is_file():
            raise SettingError(f"{setting}: {file}: no such file below {Path.cwd()}")
    return files


def read_records(
    file: Path,
    attr: Attr,
    images: ImageFolder,
    limit: int | None = None,
    answered: bool = True,
    skip: Callable[[RecordError], object] | None = None,
) -> Iterator[Record]:
    """Of the first `limit` records of a file, in order; `answered`: each must end with an assistant turn.

    skip: is told of each record that cannot be used, which is then left out; None: the first such raises RecordError.
    """
    names = FieldNames.of(attr)
    for number, raw in enumerate(islice(read_json(file, lenient=skip is not None), limit), 1):
        try:
            if isinstance(raw, RecordError):
                raise raw
            record = parse_record(raw, f"{file}, record {number}", names, images, answered)
        except RecordError as error:
            if skip is None:
                raise
            skip(error)
        else:
            yield record


def read_json(file: Path, lenient: bool = False) -> Iterator[Any]:
    """The values of a JSON list, or of JSON lines; which of them it is shows in the first character.

    lenient: a line that is not JSON becomes a RecordError among the values, unless no line of the file is.
    """
    broken: list[RecordError] = []
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            start = " "
            while start.isspace():
                start = stream.read(1)
            stream.seek(0)
            if start == "[":
                yield from json.load(stream)
                return
            for line in stream:
                if line.strip():
                    number += 1
                    value = _json_line(line, f"{file}, record {number}")
                    if isinstance(value, RecordError):
                        broken.append(value)
                        if not lenient:
                            raise value
                    yield value
    except json.JSONDecodeError as error:
        raise RecordError(f"{file}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists within lists without end
        raise RecordError(f"{file}: JSON that cannot be read: {one_line(error)}") from None
    if start == "":
        raise RecordError(f"{file}: is empty")
    if len(broken) == number:
        raise broken[0]


def _json_line(line: str, source: str) -> Any:
    """Its value, or what is wrong with it."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RecordError(f"{source}: not JSON: {error.msg} at column {error.colno} of its line", "not JSON")
    except (ValueError, RecursionError) as error:
        return RecordError(f"{source}: JSON that cannot be read: {one_line(error)}", "not JSON")


def parse_record(raw: Any, source: str, names: FieldNames, folder: ImageFolder, answered: bool = True) -> Record:
    """One JSON value -> Record. Raises RecordError."""
    if not isinstance(raw, dict):
        raise RecordError(f"{source}: is {_kind(raw)}, not an object with messages or conversations")
    if isinstance(raw.get("id"), str | int):
        source = f"{source} (id {' '.join(str(raw['id']).split())[:80]})"
    if unread := [name for name in UNREAD if raw.get(name)]:
        raise RecordError(
            f"{source}: has {', '.join(unread)}, which are not read yet; training without them would be wrong"
        )
    field = _one_of(raw, names.messages, source)
    if field is None:
        raise RecordError(f"{source}: has no field {_listed(names.messages)}; it has {', '.join(map(repr, raw))[:200]}")
    turns = _parse_turns(raw[field], field, source, names)
    _check_order(turns, field, source, answered)
    images = _parse_images(raw, source, names, folder)
    places = sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if images and not places:
        raise RecordError(
            f"{source}, {field}: {len(images)} image{'s' * (len(images) > 1)} but no <image> in what the user says; "
            "put one where each image belongs",
            MISCOUNTED,
        )
    if places != len(images):
        raise RecordError(
            f"{source}, {field}: {places} <image> in what the user says, but {len(images)} image{'s' * (len(images) != 1)}",
            MISCOUNTED,
        )
    return Record(source, turns, images)


def _one_of(raw: dict[str, Any], names: Names, source: str) -> str | None:
    """The one of `names` that the object has, or None."""
    own, *usual = names
    if own is not None and raw.get(own) is not None:
        return own
    present = [name for name in usual if name is not None and raw.get(name) is not None]
    if len(present) > 1:
        raise RecordError(f"{source}: has both {' and '.join(present)}; say in attr which one counts")
    return present[0] if present else None


def _listed(names: Names) -> str:
    return " or ".join(name for name in names if name is not None)


def _parse_turns(raw: Any, field: str, source: str, names: FieldNames) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise RecordError(f"{source}, {field}: is {_kind(raw)}, not a list of turns")
    turns = []
    for i, entry in enumerate(raw):
        where = f"{source}, {field}[{i}]"
        if not isinstance(entry, dict):
            raise RecordError(f"{where}: is {_kind(entry)}, not an object")
        role_field, content_field = _one_of(entry, names.role, where), _one_of(entry, names.content, where)
        if role_field is None:
            raise RecordError(f"{where}: has no field {_listed(names.role)}")
        if content_field is None:
            raise RecordError(f"{where}: has no text in {_listed(names.content)}")
        tag = entry[role_field]
        role = names.roles.get(tag) if isinstance(tag, str) else None
        if role is None:
            raise RecordError(f"{where}.{role_field}: {repr(tag)[:80]} is not one of {', '.join(names.roles)}")
        reasoning = entry.get("reasoning_content") if role == "assistant" else None
        turns.append(
            Turn(
                role,
                _text(entry[content_field], f"{where}.{content_field}"),
                None if reasoning is None else _text(reasoning, f"{where}.reasoning_content"),
            )
        )
    return tuple(turns)


def _check_order(turns: tuple[Turn, ...], field: str, source: str, answered: bool) -> None:
    offset = 1 if turns[0].role == "system" else 0
    for i, turn in enumerate(turns[offset:]):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise RecordError(
                f"{source}, {field}[{i + offset}]: a turn of the {turn.role} where one of the {expected} belongs; "
                "turns are [system,] user, assistant, user, assistant, …"
            )
    if len(turns) == offset:
        raise RecordError(f"{source}, {field}: has no turn of the user")
    if answered and turns[-1].role != "assistant":
        raise RecordError(f"{source}, {field}[{len(turns) - 1}]: ends with the user; there is no answer to train on")


def _parse_images(raw: dict[str, Any], source: str, names: FieldNames, folder: ImageFolder) -> tuple[Path, ...]:
    field = _one_of(raw, names.images, source)
    if field is None:
        return ()
    value = raw[field]
    entries = [value] if isinstance(value, str) and value else value or []
    if not isinstance(entries, list):
        raise RecordError(f"{source}, {field}: is {_kind(value)}, not a path or a list of paths")
    paths = []
    for i, name in enumerate(entries):
        where = f"{source}, {field}[{i}]" if isinstance(value, list) else f"{source}, {field}"
        if not isinstance(name, str) or not name:
            raise RecordError(f"{where}: is {_kind(name)}, not a path")
        name = _text(name, where)
        try:
            paths.append(folder.path(name))
        except ValueError as error:
            raise RecordError(f"{where}: {error}", "image outside dataset_dir") from None
        except OSError as error:
            raise RecordError(f"{where}: {name[:80]!r}: {error.strerror}", "image missing") from None
    return tuple(paths)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{where}: half a surrogate pair, which is no text") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value in ("", [], {}):
        return "empty"
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return kinds.get(type(value), "a number")
