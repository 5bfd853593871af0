"""A record as the rest of the package sees it, whatever form it was brought in."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qwen35.errors import UserError, shortened, visible

Role = Literal["system", "user", "assistant", "tool"]
IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
PLACEHOLDER = re.compile(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})")
LONGEST_MESSAGE = 600  # characters, whatever a record or the path of its image holds


class RecordError(UserError):
    """One line that names the file, the record (from 1, with its id if it has one) and the field."""

    def __init__(self, message: str, kind: str = "malformed", image: str | None = None):
        """kind: in two or three words what is wrong; image: the file that made the record a bad one."""
        super().__init__(shortened(visible(message), LONGEST_MESSAGE))
        self.kind, self.image = kind, image


@dataclass(frozen=True)
class Video:
    source: Path | tuple[Path, ...]  # a file or a folder of frames; or the frames, in order
    fps: float | None = (
        None  # frames a second of a folder or a list; None: it holds those to be taken, video_fps a second
    )

    def __str__(self) -> str:
        if isinstance(self.source, Path):
            return str(self.source)
        return f"{self.source[0]} … ({len(self.source)} frames)" if self.source else "a video of no frames"


Visual = Path | Video  # an image file, or a video
Part = str | Visual


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = field(
        default=None, compare=False
    )  # which a response may name; the chat template has no text for it


@dataclass(frozen=True)
class Turn:
    role: Role
    content: (
        str | tuple[Part, ...]
    )  # text; in turns of the user and of tools also texts with images and videos between them
    reasoning: str | None = None  # `reasoning_content` of an assistant turn
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant turn
    loss: bool | None = None  # what the record says of it: whether its tokens are trained; None: nothing
    tool_call_id: str | None = field(default=None, compare=False)  # of a tool's turn: the call that it answers

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """Without its images and videos."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part for part in self.parts if isinstance(part, str))


def content_of(parts: Iterable[Part]) -> str | tuple[Part, ...]:
    """Texts that follow each other become one, and what holds no image or video a text."""
    whole: list[Part] = []
    for part in parts:
        if isinstance(part, str) and whole and isinstance(whole[-1], str):
            whole[-1] += part
        elif part != "":
            whole.append(part)
    if len(whole) == 1 and isinstance(whole[0], str):
        return whole[0]
    return tuple(whole) or ""


def with_visuals(text: str, visuals: Mapping[str, Iterator[Visual]]) -> str | tuple[Part, ...]:
    """The content that a text stands for: the next image or video where a placeholder is that `visuals` has some for.

    There must be one for each such place; any other placeholder is text.
    """
    return content_of(next(visuals[part]) if part in visuals else part for part in PLACEHOLDER.split(text) if part)


@dataclass(frozen=True)
class Record:
    source: str  # "data/a.json, record 12 (id 7)", for messages
    turns: tuple[Turn, ...]  # [system,] user, assistant, user, …; between assistant turns also those of tools
    tools: tuple[Any, ...] = ()  # what the model may call, each as JSON describes it

    def error(self, message: str, kind: str = "malformed", image: str | None = None) -> RecordError:
        return RecordError(f"{self.source}: {message}", kind, image)

    @cached_property
    def visuals(self) -> list[Visual]:
        """Images and videos in order of appearance."""
        parts = (part for turn in self.turns if not isinstance(turn.content, str) for part in turn.content)
        return [part for part in parts if not isinstance(part, str)]

    @cached_property
    def images(self) -> tuple[Path, ...]:
        return tuple(visual for visual in self.visuals if not isinstance(visual, Video))

    @cached_property
    def videos(self) -> tuple[Video, ...]:
        return tuple(visual for visual in self.visuals if isinstance(visual, Video))
