"""Where a record keeps what: the names that attr gives, else the usual ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwen35.data.record import RecordError, Role
from qwen35.settings import Attr

USUAL_ROLES: dict[str, Role] = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
FUNCTION_CALL = "function_call"  # of ShareGPT: an assistant turn that is nothing but calls
# what others read in a turn, and without which training would be wrong -> what is read instead
UNREAD_IN_TURNS = {
    "function_call": "calls from tool_calls", "reasoning": "thoughts from reasoning_content",
    "thinking": "thoughts from reasoning_content",
}  # fmt: skip
PREFERENCES = ("chosen", "rejected")  # pairs of answers, of which none is known to be the one to train
SHARES = ("weight", "loss", "train")  # of an answer, whether it is trained: 1, true and null are what holds anyway


@dataclass(frozen=True)
class Names:
    """Of one field. A name with dots, as attr may give it, is looked for inside: `message.content`."""

    own: str | None
    usual: tuple[str, ...]

    def find(self, raw: Mapping[str, Any], source: str) -> tuple[str, Any] | None:
        """(name, value) of the one that the object has, or None. Raises RecordError if it has several."""
        if self.own is not None and (value := _inside(raw, self.own)) is not None:
            return self.own, value
        found = None
        for name in self.usual:
            if (value := raw.get(name)) is not None:
                if found is not None:
                    raise RecordError(f"{source}: has both {found[0]} and {name}; say in attr which one counts")
                found = name, value
        return found

    def unusual(self) -> str | None:
        """The name that attr gives, where it is not a usual one."""
        return None if self.own in self.usual else self.own

    def has_own(self, raw: Mapping[str, Any]) -> bool:
        return self.own is not None and _inside(raw, self.own) is not None

    def any_of(self, raw: Mapping[str, Any]) -> Any:
        """The first value that `find` might find, or None."""
        values = ([_inside(raw, self.own)] if self.own is not None else []) + [raw.get(name) for name in self.usual]
        return next((value for value in values if value is not None), None)

    def __str__(self) -> str:
        return " or ".join(name for name in (self.own, *self.usual) if name is not None)


def _inside(raw: Any, name: str) -> Any:
    if isinstance(raw, Mapping) and raw.get(name) is not None:
        return raw[name]
    for part in name.split("."):
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


@dataclass(frozen=True)
class FieldNames:
    messages: Names
    images: Names
    videos: Names
    tools: Names
    system: Names
    role: Names
    content: Names
    roles: Mapping[str, Role]
    calls: frozenset[str]  # roles whose content is a tool call
    unread: tuple[str, ...] = ("audios", "audio", "functions")  # what others read in a record, as UNREAD_IN_TURNS
    preferences: tuple[str, ...] = PREFERENCES

    @cached_property
    def read(self) -> frozenset[str]:
        """The fields of a record that are looked at, or lie around one that is."""
        named = (self.messages, self.images, self.videos, self.tools, self.system)
        own = [part for name in named if name.own is not None for part in (name.own, name.own.split(".")[0])]
        return frozenset([*own, *(usual for name in named for usual in name.usual)])

    def decides(self, name: str) -> bool:
        """Whether the value of a record's field does; of others the name is enough."""
        return name in self.read or name == "id" or name in self.unread or name in self.preferences

    @classmethod
    def of(cls, attr: Attr) -> "FieldNames":
        own: tuple[tuple[str | None, Role], ...] = (
            (attr.system_tag, "system"),
            (attr.user_tag, "user"),
            (attr.assistant_tag, "assistant"),
            (attr.observation_tag, "tool"),
            (attr.function_tag, "assistant"),
        )
        roles = USUAL_ROLES | {FUNCTION_CALL: "assistant"} | {tag: role for tag, role in own if tag}
        return cls(
            Names(attr.messages, ("messages", "conversations")),
            Names(attr.images, ("images", "image")),
            Names(attr.videos, ("videos", "video")),
            Names(attr.tools, ("tools",)),
            Names(attr.system, ("system",)),
            Names(attr.role_tag, ("role", "from")),
            Names(attr.content_tag, ("content", "value")),
            roles,
            frozenset({FUNCTION_CALL, *([attr.function_tag] if attr.function_tag else [])}),
            preferences=() if attr.messages else PREFERENCES,
        )

    @classmethod
    def llava(cls) -> "FieldNames":
        """Only what LLaVA-Instruct has: anything else is an error."""
        none = Names(None, ())
        return cls(
            Names(None, ("conversations",)),
            Names(None, ("image",)),
            none,
            none,
            none,
            Names(None, ("from",)),
            Names(None, ("value",)),
            {"human": "user", "gpt": "assistant"},
            frozenset(),
            ("videos", "video", "audios", "audio", "tools", "functions", "system", *PREFERENCES),
            (),
        )
