"""A record as the rest of the package sees it, whatever form it was brought in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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
class ToolCall:
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    role: Role
    content: str  # in the turns of the user, <image> and <video> stand where one belongs
    reasoning: str | None = None  # `reasoning_content` of an assistant turn
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant turn


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


@dataclass(frozen=True)
class Record:
    source: str  # "data/a.json, record 12 (id 7)", for messages
    turns: tuple[Turn, ...]  # [system,] user, assistant, user, …; between assistant turns also those of tools
    images: tuple[Path, ...] = ()  # one for each `<image>` in the user turns, in order
    videos: tuple[Video, ...] = ()  # one for each `<video>`
    tools: tuple[Any, ...] = ()  # what the model may call, each as JSON describes it

    def error(self, message: str, kind: str = "malformed", image: str | None = None) -> RecordError:
        return RecordError(f"{self.source}: {message}", kind, image)

    @property
    def visuals(self) -> list[Visual]:
        """Images and videos in order of appearance."""
        images, videos = iter(self.images), iter(self.videos)
        places = [place for turn in self.turns if turn.role == "user" for place in PLACEHOLDER.findall(turn.content)]
        return [next(images) if place == IMAGE_PLACEHOLDER else next(videos) for place in places]
