"""Parses what turns hold: text, content lists with images and videos, tool calls; and the tools."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.data.fields import (
    HARMLESS_IN_CALLS,
    HARMLESS_IN_ITEMS,
    HARMLESS_IN_RECORDS,
    REFUSED_AROUND_CALLS,
    REFUSED_IN_CALLS,
    REFUSED_IN_ITEMS,
    Fields,
    is_nothing,
)
from qwen35.data.media import ImageFolder
from qwen35.data.readers import STRICT, LossyJSONError
from qwen35.data.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Part, RecordError, Role, ToolCall, Video, Visual

OUTSIDE, MISSING = "image outside dataset_dir", "image missing"
MEDIA = ("image", "image_url", "video", "video_url")  # types of content items other than text
EXTRA = {"text": (), "image": ("url", "path"), "video": ("url", "path", "sample_fps")}  # further fields of each type
ITEM = {
    name: Fields(HARMLESS_IN_ITEMS | {"type", "text", *MEDIA, *extra}, REFUSED_IN_ITEMS)
    for name, extra in EXTRA.items()
}
IMAGE = Fields(HARMLESS_IN_RECORDS | {"bytes", "path", "url", "image", "detail", "format"}, REFUSED_IN_ITEMS)
VIDEO = Fields(HARMLESS_IN_RECORDS | {"frames", "video", "path", "url", "sample_fps"}, REFUSED_IN_ITEMS)
CALL = Fields(HARMLESS_IN_CALLS | {"name", "arguments"}, REFUSED_IN_CALLS)
# the OpenAI API's object around a call
AROUND_CALL = Fields(HARMLESS_IN_CALLS | {"function"}, REFUSED_IN_CALLS | REFUSED_AROUND_CALLS)


@dataclass(frozen=True)
class Placeholder:
    """Stands for the next image or video from the record's own field."""

    tag: str  # <image> or <video>


@dataclass
class Parser:
    """Parses the parts of one record and collects its unread fields. Raises RecordError."""

    folder: ImageFolder
    ignored: frozenset[str] = frozenset()  # fields in attr.ignore
    unread: list[tuple[str, str]] = field(default_factory=list)  # (where, field)

    def check(self, raw: Mapping[str, Any], fields: Fields, where: str) -> None:
        """Collect the fields that are not read; one that is refused is an error."""
        if fields.named or not raw.keys() <= fields.known:
            self.unread += ((where, name) for name in fields.unread(raw, where, self.ignored))

    def visuals(self, value: Any, where: str, is_video: bool) -> list[Visual]:
        """From a field of the record: a path, an object that holds one, or a list of these."""
        parse = self._video if is_video else self._image
        if isinstance(value, list):
            return [parse(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
        return [] if value in ("", {}, b"") else [parse(value, where)]

    def _image(self, value: Any, where: str) -> Path:
        if isinstance(value, dict):  # {"url": …}, or {"bytes": …, "path": …} as in parquet files
            self.check(value, IMAGE, where)
            name = _key_of(value, ("path", "url", "image"), where, "a path") if value.get("bytes") is None else "bytes"
            where, value = f"{where}.{name}", value[name]
        if isinstance(value, bytes) and value:
            try:
                return self.folder.store(value)
            except ValueError as error:
                raise RecordError(f"{where}: {error}") from None
        return self._path(value, where, may_embed=True)

    def _path(self, value: Any, where: str, may_embed: bool = False) -> Path:
        """may_embed: the value may also be a `data:` URL."""
        if not isinstance(value, str) or not value:
            raise RecordError(f"{where}: is {kind(value)}, not a path")
        name = text(value, where)
        try:
            return self.folder.image(name) if may_embed else self.folder.path(name)
        except ValueError as error:
            raise RecordError(f"{where}: {error}", OUTSIDE) from None
        except OSError as error:
            raise RecordError(f"{where}: {name[:80]!r}: {error.strerror}", MISSING) from None

    def _video(self, value: Any, where: str, fps: Any = None) -> Video:
        if isinstance(value, dict):  # {"frames": […], "sample_fps": 2}, {"url": …}
            self.check(value, VIDEO, where)
            name = _key_of(value, ("frames", "video", "path", "url"), where, "a path or a list of frames")
            where, value, fps = f"{where}.{name}", value[name], value.get("sample_fps", fps)
        is_rate = isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps <= 1000
        if fps is not None and not is_rate:
            raise RecordError(f"{where}: sample_fps: {str(fps)[:80]} is not a number of frames per second")
        rate = None if fps is None else float(fps)
        if not isinstance(value, list):
            return Video(self._path(value, where), rate)
        frames = tuple(self._path(frame, f"{where}[{i}]") for i, frame in enumerate(value))
        if not frames:
            raise RecordError(f"{where}: is empty, not a list of frames")
        return Video(frames, rate)

    def content(self, value: Any, where: str, role: Role) -> str | tuple[Part | Placeholder, ...]:
        """A string, or the parts of a content list, in which `<image>` in a text stays text."""
        if not isinstance(value, list):
            return text(value, where)
        return tuple(self._item(item, f"{where}[{i}]", role) for i, item in enumerate(value))

    def _item(self, item: Any, where: str, role: Role) -> Part | Placeholder:
        if not isinstance(item, dict):
            raise RecordError(f"{where}: is {kind(item)}, not an object with a type")
        given = item.get("type")
        present = [name for name in ("text", *MEDIA) if not is_nothing(item.get(name))]
        name = given if given is not None else present[0] if len(present) == 1 else None
        if name not in ("text", *MEDIA):
            what = f"type {repr(given)[:80]}" if given is not None else "no type"
            raise RecordError(f"{where}: has {what}; supported are text, image, image_url, video and video_url")
        self.check(item, ITEM[name.removesuffix("_url")], where)
        if others := [key for key in present if key.removesuffix("_url") != name.removesuffix("_url")]:
            raise RecordError(f"{where}: has type {name} and also {others[0]}; put each in an item of its own")
        if name == "text":
            return text(item.get("text"), f"{where}.text")
        is_video = name.startswith("video")
        if role not in ("user", "tool"):
            raise RecordError(
                f"{where}: {'a video' if is_video else 'an image'} in a turn of the {role}; only user and tool turns have any"
            )
        keys = dict.fromkeys((name, name.removesuffix("_url"), "url", "path"))
        if any(not is_nothing(item.get(key)) for key in keys):
            key = _key_of(item, keys, where, "a path")
            place = f"{where}.{key}"
            return self._video(item[key], place, item.get("sample_fps")) if is_video else self._image(item[key], place)
        return Placeholder(VIDEO_PLACEHOLDER if is_video else IMAGE_PLACEHOLDER)

    def calls(self, value: Any, where: str) -> tuple[ToolCall, ...]:
        """From `tool_calls` as in the OpenAI API, or the JSON text of one or several calls."""
        entries = _json(value, where)
        entries = [entries] if isinstance(entries, dict) else entries or []
        if not isinstance(entries, list):
            raise RecordError(f"{where}: is {kind(entries)}, not a list of calls")
        return tuple(self._call(entry, f"{where}[{i}]") for i, entry in enumerate(entries))

    def _call(self, entry: Any, where: str) -> ToolCall:
        call = entry.get("function", entry) if isinstance(entry, dict) else entry
        if not isinstance(call, dict):
            raise RecordError(f"{where}: is {kind(call)}, not an object with name and arguments")
        if call is not entry:
            self.check(entry, AROUND_CALL, where)
        self.check(call, CALL, where if call is entry else f"{where}.function")
        if not (name := text(call.get("name"), f"{where}.name")):
            raise RecordError(f"{where}.name: is empty")
        arguments = _json(call.get("arguments") or {}, f"{where}.arguments") or {}
        if not isinstance(arguments, dict):
            raise RecordError(f"{where}.arguments: is {kind(arguments)}, not an object")
        checked = {text(key, f"{where}.arguments"): value for key, value in arguments.items()}
        _check_json(checked, f"{where}.arguments")
        own = call.get("id") if is_nothing(entry.get("id")) else entry["id"]
        return ToolCall(name, checked, None if is_nothing(own) else str(own))


def _key_of(raw: Mapping[str, Any], names: Iterable[str], where: str, what: str) -> str:
    """The first of `names` that has a value; several must agree. Raises RecordError."""
    present = [name for name in names if not is_nothing(raw.get(name))]
    if not present:
        raise RecordError(f"{where}: is {kind(raw)}, not {what}")
    if any(raw[name] != raw[present[0]] for name in present):
        raise RecordError(f"{where}: has {' and '.join(present)}, which differ; keep one")
    return present[0]


def parse_tools(value: Any, where: str) -> tuple[tuple[Any, ...], bool]:
    """The tools, from a list of objects or its JSON text, and whether any was brought into the form
    of the OpenAI API. Raises RecordError.
    """
    tools = _json(value, where) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(f"{where}: is {kind(tools)}, not a list of objects")
    parsed = [_tool(tool, f"{where}[{i}]") for i, tool in enumerate(tools)]
    _check_json(parsed, where)
    return tuple(parsed), parsed != tools


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool as servers pass it to the chat template, which writes it as it is.

    Many data sets list bare functions, or hold objects as JSON text, which columns of a table need.
    A server's API takes neither. Raises RecordError.
    """
    kept = {name: value for name, value in tool.items() if name not in ("type", "function") or value is not None}
    if kept.get("type", "function") != "function" or not kept.keys() & {"function", "name"}:
        return tool
    around = (
        kept if {"type", "function"} <= kept.keys() else {"type": "function"} | (kept if "function" in kept else {})
    )
    function = _json(kept["function"], f"{where}.function") if "function" in kept else kept
    if not isinstance(function, dict):
        raise RecordError(f"{where}.function: is {kind(function)}, not an object")
    if "input_schema" in function:
        raise RecordError(f"{where}: has input_schema, which no server passes on; it belongs in parameters")
    function = {name: value for name, value in function.items() if function is not kept or name != "type"}
    if isinstance(function.get("parameters"), str):
        function |= {"parameters": _json(function["parameters"], f"{where}.parameters") or {}}
    return around | {"function": function}


def _json(value: Any, where: str) -> Any:
    """The value of JSON text; anything else is a value already. Raises RecordError."""
    if not isinstance(value, str):
        return value
    try:
        return STRICT.decode(value) if value.strip() else []
    except LossyJSONError as error:
        raise RecordError(f"{where}: {error}") from None
    except (ValueError, RecursionError):
        raise RecordError(f"{where}: {value[:80]!r} is not JSON") from None


def _check_json(value: Any, where: str) -> None:
    try:
        text(json.dumps(value, ensure_ascii=False, allow_nan=False), where)
    except (TypeError, ValueError, RecursionError):
        raise RecordError(f"{where}: holds a value that JSON cannot represent") from None


def text(value: Any, where: str) -> str:
    """The value, if it is text that can be encoded. Raises RecordError."""
    if not isinstance(value, str):
        raise RecordError(f"{where}: is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{where}: half a surrogate pair, which is not valid text") from None
    return value


def kind(value: Any) -> str:
    """The kind of a JSON value, for messages."""
    if value is None:
        return "null"
    if value in ("", b"", [], {}):
        return "empty"
    kinds = {dict: "an object", list: "a list", str: "text", bytes: "bytes", bool: "true or false"}
    return kinds.get(type(value), "a number")
