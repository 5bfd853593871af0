"""A record in one form, whatever format its file has: turns of text, images and videos.

Knows nothing of files, templates or tokens.
"""

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
    """One line that names the file, the record (from 1, with its id if any) and the field."""

    def __init__(self, message: str, kind: str = "malformed", image: str | None = None):
        """kind: what is wrong, in two or three words; image: the image file at fault, if any."""
        super().__init__(shortened(visible(message), LONGEST_MESSAGE))
        self.kind, self.image = kind, image


@dataclass(frozen=True)
class Video:
    source: Path | tuple[Path, ...]  # a video file or a folder of frames; or the frame files, in order
    fps: float | None = None  # of a folder or a list of frames; None: the frames are already sampled at video_fps

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
    id: str | None = field(default=None, compare=False)  # responses name it; the family's templates do not write it


@dataclass(frozen=True)
class Turn:
    role: Role
    content: str | tuple[Part, ...]  # a tuple only in user and tool turns with images or videos
    reasoning: str | None = None  # `reasoning_content` of an assistant turn
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant turn
    loss: bool | None = None  # whether the record asks to train this turn; None: the record does not say
    tool_call_id: str | None = field(default=None, compare=False)  # of a tool turn: the call that it answers
    name: str | None = field(
        default=None, compare=False
    )  # of a speaker or tool; the family's templates do not write it

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The content without its images and videos."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part for part in self.parts if isinstance(part, str))


def content_of(parts: Iterable[Part]) -> str | tuple[Part, ...]:
    """Join adjacent texts; without any image or video the content is a plain string."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    if len(joined) == 1 and isinstance(joined[0], str):
        return joined[0]
    return tuple(joined) or ""


def with_visuals(text: str, visuals: Mapping[str, Iterator[Visual]]) -> str | tuple[Part, ...]:
    """Replace each placeholder in a text that is a key of `visuals` by its next image or video.

    The caller makes sure that there are enough. Other placeholders stay text.
    """
    return content_of(next(visuals[part]) if part in visuals else part for part in PLACEHOLDER.split(text) if part)


@dataclass(frozen=True)
class Record:
    source: str  # "data/a.json, record 12 (id 7)", for messages
    turns: tuple[Turn, ...]  # [system,] user, assistant, user, …; tool turns only between assistant turns
    tools: tuple[Any, ...] = ()  # JSON descriptions of the functions that the model may call
    rejected: "Record | None" = None  # of a preference pair: the other answer, behind the same prompt

    def error(self, message: str, kind: str = "malformed", image: str | None = None) -> RecordError:
        return RecordError(f"{self.source}: {message}", kind, image)

    @property
    def has_right_answer(self) -> bool:
        """Whether its last answer is one to learn, and to compare with: a loss mask may deny it."""
        return self.turns[-1].loss is not False

    @cached_property
    def visuals(self) -> list[Visual]:
        """The images and videos, in order of appearance."""
        parts = (part for turn in self.turns if not isinstance(turn.content, str) for part in turn.content)
        return [part for part in parts if not isinstance(part, str)]

    @cached_property
    def images(self) -> tuple[Path, ...]:
        return tuple(visual for visual in self.visuals if not isinstance(visual, Video))

    @cached_property
    def videos(self) -> tuple[Video, ...]:
        return tuple(visual for visual in self.visuals if isinstance(visual, Video))
