"""What turns hold: text, or a list of texts, images and videos; and what the tools of a conversation are."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.data import strict_json
from qwen35.data.folder import ImageFolder
from qwen35.data.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, RecordError, ToolCall, Video
from qwen35.data.strict_json import LossyJSONError

VIDEO_LIMITS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
SIZE_LIMITS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
OUTSIDE, MISSING = "image outside dataset_dir", "image missing"


@dataclass
class Visuals:
    """The images and videos that a record names, in order, in a field of its own or between the texts."""

    folder: ImageFolder
    images: list[Path] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)

    def add_field(self, value: Any, where: str, is_video: bool) -> None:
        """A path, an object that holds one, or a list of such."""
        entries = value if isinstance(value, list) else [value] if value not in ("", {}, b"") else []
        for i, entry in enumerate(entries):
            self.add(entry, f"{where}[{i}]" if isinstance(value, list) else where, is_video)

    def add(self, value: Any, where: str, is_video: bool, fps: Any = None) -> None:
        if is_video:
            self.videos.append(self._video(value, where, fps))
        else:
            self.images.append(self._image(value, where))

    def _image(self, value: Any, where: str) -> Path:
        if isinstance(value, dict):  # {"url": …}, or what parquet files hold: {"bytes": …, "path": …}
            held = [name for name in ("bytes", "path", "url", "image") if value.get(name) is not None]
            if not held:
                raise RecordError(f"{where}: is {kind(value)}, not a path")
            where, value = f"{where}.{held[0]}", value[held[0]]
        if isinstance(value, bytes) and value:
            try:
                return self.folder.keep(value)
            except ValueError as error:
                raise RecordError(f"{where}: {error}") from None
        return self._path(value, where, may_hold_it=True)

    def _path(self, value: Any, where: str, may_hold_it: bool = False) -> Path:
        if not isinstance(value, str) or not value:
            raise RecordError(f"{where}: is {kind(value)}, not a path")
        name = text(value, where)
        try:
            return self.folder.image(name) if may_hold_it else self.folder.path(name)
        except ValueError as error:
            raise RecordError(f"{where}: {error}", OUTSIDE) from None
        except OSError as error:
            raise RecordError(f"{where}: {name[:80]!r}: {error.strerror}", MISSING) from None

    def _video(self, value: Any, where: str, fps: Any) -> Video:
        if isinstance(value, dict):  # {"frames": […], "sample_fps": 2}, {"url": …}
            held = [name for name in ("frames", "video", "path", "url") if value.get(name) is not None]
            if not held:
                raise RecordError(f"{where}: is {kind(value)}, not a path or a list of frames")
            _refuse(value, VIDEO_LIMITS + SIZE_LIMITS, where)
            where, value, fps = f"{where}.{held[0]}", value[held[0]], value.get("sample_fps", fps)
        is_rate = isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps <= 1000
        if fps is not None and not is_rate:
            raise RecordError(f"{where}: sample_fps: {str(fps)[:80]} is not a number of frames a second")
        rate = None if fps is None else float(fps)
        if not isinstance(value, list):
            return Video(self._path(value, where), rate)
        frames = tuple(self._path(frame, f"{where}[{i}]") for i, frame in enumerate(value))
        if not frames:
            raise RecordError(f"{where}: is empty, not a list of frames")
        return Video(frames, rate)


def parse_content(value: Any, where: str, role: str, own: Visuals) -> str:
    """Text as it is; a list (as the OpenAI API has it) as text with a placeholder for each image and video.

    What such a list names goes to `own`; an item without a path stands for the next one of the record's own field.
    """
    if not isinstance(value, list):
        return text(value, where)
    return "".join(_item(item, f"{where}[{i}]", role, own) for i, item in enumerate(value))


def _item(item: Any, where: str, role: str, own: Visuals) -> str:
    if not isinstance(item, dict):
        raise RecordError(f"{where}: is {kind(item)}, not an object with a type")
    given = item.get("type")
    present = [name for name in ("text", "image", "image_url", "video", "video_url") if item.get(name) is not None]
    name = given if given is not None else present[0] if len(present) == 1 else None
    if name == "text":
        return text(item.get("text"), f"{where}.text")
    if name not in ("image", "image_url", "video", "video_url"):
        told = f"type {repr(given)[:80]}" if given is not None else "no type"
        raise RecordError(f"{where}: has {told}; text, image, image_url, video and video_url are read")
    is_video = name.startswith("video")
    if role != "user":
        raise RecordError(
            f"{where}: {'a video' if is_video else 'an image'} in a turn of the {role}; only the user shows any"
        )
    _refuse(item, SIZE_LIMITS + VIDEO_LIMITS * is_video, where)
    held = [key for key in (name, name.removesuffix("_url"), "url", "path") if item.get(key) is not None]
    if held:
        own.add(item[held[0]], f"{where}.{held[0]}", is_video, item.get("sample_fps"))
    return VIDEO_PLACEHOLDER if is_video else IMAGE_PLACEHOLDER


def _refuse(item: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """What others read there, and is here a setting for all records."""
    for key in keys:
        if item.get(key) is not None:
            raise RecordError(f"{where}: has {key}, which is not read; preprocess_parameters hold for all records")


def parse_calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    """`tool_calls` as the OpenAI API has them, or the JSON text of one call or several."""
    entries = _json(value, where)
    entries = [entries] if isinstance(entries, dict) else entries or []
    if not isinstance(entries, list):
        raise RecordError(f"{where}: is {kind(entries)}, not a list of calls")
    return tuple(_call(entry, f"{where}[{i}]") for i, entry in enumerate(entries))


def _call(entry: Any, where: str) -> ToolCall:
    call = entry.get("function", entry) if isinstance(entry, dict) else entry
    if not isinstance(call, dict):
        raise RecordError(f"{where}: is {kind(call)}, not an object with name and arguments")
    name = text(call.get("name"), f"{where}.name")
    arguments = _json(call.get("arguments") or {}, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RecordError(f"{where}.arguments: is {kind(arguments)}, not an object")
    checked = {text(key, f"{where}.arguments"): value for key, value in arguments.items()}
    _check_json(checked, f"{where}.arguments")
    return ToolCall(name, checked)


def parse_tools(value: Any, where: str) -> tuple[Any, ...]:
    """A list of what can be called, or its JSON text."""
    tools = _json(value, where)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(f"{where}: is {kind(tools)}, not a list of objects")
    _check_json(tools, where)
    return tuple(tools)


def _json(value: Any, where: str) -> Any:
    """Text is JSON, anything else stands for itself."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json.loads(value) if value.strip() else []
    except LossyJSONError as error:
        raise RecordError(f"{where}: {error}") from None
    except (ValueError, RecursionError):
        raise RecordError(f"{where}: {value[:80]!r} is not JSON") from None


def _check_json(value: Any, where: str) -> None:
    try:
        text(json.dumps(value, ensure_ascii=False, allow_nan=False), where)
    except (TypeError, ValueError, RecursionError):
        raise RecordError(f"{where}: holds what JSON cannot say") from None


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{where}: half a surrogate pair, which is no text") from None
    return value


def kind(value: Any) -> str:
    if value is None:
        return "null"
    if value in ("", b"", [], {}):
        return "empty"
    kinds = {dict: "an object", list: "a list", str: "text", bytes: "bytes", bool: "true or false"}
    return kinds.get(type(value), "a number")
