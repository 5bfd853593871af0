"""Where a record keeps what, by the names that attr gives, else the usual ones; and what becomes of every other field."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qwen35.config.schema import Attr
from qwen35.data.record import RecordError, Role
from qwen35.errors import SettingError

USUAL_ROLES: dict[str, Role] = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
FUNCTION_CALLS = ("function_call", "tool_call")  # an assistant turn that is nothing but calls: of ShareGPT, of ms-swift
LOSS = ("loss_mask", "loss", "train", "trainable", "weight", "loss_scale")  # of a turn, whether it is trained: 1 or 0
BESIDE_CONTENT = ("reasoning_content", "tool_calls", "tool_call_id")  # what else a turn may have
SIZE_LIMITS = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
VIDEO_LIMITS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")

# Whatever a field says may change what is trained, so each is read, or harmless, or refused, or counted as not read.
# A refused one is an error unless it is empty, or has the value under which the record is trained as it is anyway.
Refused = dict[str, tuple[str, Any]]


def _refused(*rows: tuple[str, str, Any]) -> Refused:
    """From rows of names, what to do, and the value that is no error."""
    return {name: (todo, harmless) for names, todo, harmless in rows for name in names.split()}


def _harmless(**reasons: str) -> frozenset[str]:
    """From the names by their reason."""
    return frozenset(name for names in reasons.values() for name in names.split())


PREFERENCES = _refused(
    (
        "chosen rejected rejected_messages rejected_response rejected_images",
        "preference pairs are not trained; attr.messages says which field holds the turns to train",
        None,
    ),
)
FOR_ALL = "preprocess_parameters hold for all records"
OF_RECORDS = _refused(
    ("objects", "grounding is not supported; write the boxes into the texts", None),
    ("label kto_tag", "only records whose answers are good can be trained; leave the others out", True),
    ("mask", "loss_mask, a list with 1 or 0 for each turn, says which are trained", None),
    ("loss train trainable loss_scale", "loss_mask, a list with 1 or 0 for each turn, says which are trained", True),
    ("weight", "a record has no weight; a file has one, in dataset", 1),
    ("audio audios", "audio is not supported", None),
    ("functions", "what can be called is read from tools", None),
    ("system_prompt system_message", "attr.system says which field holds the system's text", None),
    ("chat_template_kwargs enable_thinking", "enable_thinking is a setting for all records", None),
    ("continue_final_message add_generation_prompt", "an answer is trained from its first word to its end", False),
    (" ".join(SIZE_LIMITS + VIDEO_LIMITS), FOR_ALL, None),
)
OF_TURNS = _refused(
    ("function_call tool_call", "calls are read from tool_calls", None),
    ("reasoning thinking thought think", "thoughts are read from reasoning_content", None),
    ("refusal", "the text of a refusal belongs in the content", None),
    ("prefix partial", "an answer is trained from its first word on", False),
    ("channel", "thoughts are read from reasoning_content, and any other answer is trained as the final one", "final"),
    ("mask label", "loss_mask with 1 or 0 says whether a turn is trained", None),
    ("image images video videos", "they are read from a list in the content, or from the record's field", None),
    ("audio audios", "audio is not supported", None),
    ("tools functions", "what can be called is read from the record's field", None),
)
OF_ITEMS = _refused(
    (" ".join(SIZE_LIMITS + VIDEO_LIMITS), FOR_ALL, None),
    ("start end start_time end_time", "a video is taken from its start to its end", None),
)
AROUND_CALLS = _refused(("arguments", "where a call has function, they belong in there", None))
OF_CALLS = _refused(("parameters params input args kwargs", "arguments are read from arguments", None))

DESCRIPTION = _harmless(
    names_it="id idx index uid uuid hash title question_id sample_id conversation_id prompt_id message_id turn_id parent_id",
    where_it_is_from="source data_source dataset dataset_name origin url license model timestamp date created_at",
    what_it_is_about="language lang category topic domain task task_type tags difficulty ability metadata meta extra_info",
    how_good_it_is="score scores quality rating",
    how_large_it_is="width height image_size num_turns num_tokens token_count tokens",
)
IN_RECORDS = DESCRIPTION | _harmless(
    of_reinforcement_learning="solution ground_truth reward reward_model margin",
    names_a_curve_of_the_loss="channel",
    how_an_api_answered="parallel_tool_calls",
)
IN_TURNS = DESCRIPTION | _harmless(no_text_in_the_chat_template="name", of_an_api="type annotations cache_control")
IN_ITEMS = _harmless(of_an_api="id index annotations cache_control detail")
IN_CALLS = _harmless(names_it="id index type")

# A field of any other name is an error where one of its words is one of these, in whatever form: loss_masks, isTrainable.
INSTRUCTION = re.compile(
    r"(un|non)?(mask|label|loss|weight|reject|choose|chosen|prefer|train|supervise|ignore|skip|exclude|object|b?box)"
    r"(s|es|d|ed|red|ing|able|ence)?",
    re.IGNORECASE,
)
WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+")


def is_instruction(name: str) -> bool:
    """Whether a field's name looks like an instruction on what is trained."""
    return any(map(INSTRUCTION.fullmatch, WORD.findall(name)))


def is_nothing(value: Any) -> bool:
    """Whether a value says nothing: what the tables of Arrow fill up with."""
    if isinstance(value, dict):
        return all(map(is_nothing, value.values()))
    return all(map(is_nothing, value)) if isinstance(value, list) else value is None or value in ("", b"")


@dataclass(frozen=True)
class Fields:
    """Of objects of one kind: what becomes of each of their fields."""

    known: frozenset[str]  # is read, or harmless
    refused: Refused
    around: frozenset[str] = frozenset()  # objects that hold some of the known ones: of names with dots
    not_read: frozenset[str] = frozenset()  # are counted whatever they look like
    inside: "Fields | None" = None  # of those that lie inside another

    def unread(self, raw: Mapping[str, Any], where: str, ignored: frozenset[str]) -> Iterator[str]:
        """The fields that are neither known nor `ignored`, and say something.

        Raises RecordError for one that is refused or looks like an instruction.
        """
        for name, value in raw.items():
            if name in self.known or name in ignored or is_nothing(value):
                continue
            if name in self.around and isinstance(value, Mapping):
                fields = self.inside or self
                yield from (f"{name}.{inner}" for inner in fields.unread(value, f"{where}.{name}", ignored))
            elif name in self.refused:
                todo, harmless = self.refused[name]
                if value != harmless:
                    raise RecordError(f"{where}: has {name}, which is not read; {todo}")
            else:
                if name not in self.not_read and is_instruction(name):
                    raise RecordError(
                        f"{where}: has {str(name)[:80]}, which is not read and looks like an instruction on what is trained; "
                        "if it is none, name it in attr.ignore"
                    )
                yield name


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
                if found is not None and not is_nothing(found[1]):
                    if is_nothing(value):
                        continue
                    raise RecordError(f"{source}: has both {found[0]} and {name}; say in attr which one counts")
                found = name, value
        return found

    def whole_and_parts(self) -> Iterator[str]:
        """All that it may be found by."""
        yield from self.usual
        if self.own is not None:
            yield from (self.own, *self.own.split("."))

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
    calls: frozenset[str] = frozenset()  # roles whose content is a tool call
    refused: Refused = field(default_factory=lambda: OF_RECORDS | PREFERENCES)
    not_read: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()

    @cached_property
    def plain(self) -> frozenset[str]:
        """The fields of a turn that is nothing but text, as nearly all are."""
        return frozenset(self.role.usual + self.content.usual)

    @cached_property
    def loss(self) -> frozenset[str]:
        """The fields of a turn that say whether it is trained."""
        return frozenset(LOSS) - self.ignored

    @cached_property
    def read(self) -> frozenset[str]:
        """The fields of a record that are looked at, or lie around one that is."""
        named = (self.messages, self.images, self.videos, self.tools, self.system)
        return frozenset(name for names in named for name in names.whole_and_parts())

    @cached_property
    def of_record(self) -> Fields:
        named = (self.messages, self.images, self.videos, self.tools, self.system)
        return _fields(named, ("loss_mask",), IN_RECORDS, self.refused, self.not_read)

    @cached_property
    def of_turn(self) -> Fields:
        return _fields((self.role, self.content), (*BESIDE_CONTENT, *LOSS), IN_TURNS, OF_TURNS, frozenset())

    def decides(self, name: str) -> bool:
        """Whether the value of a record's field does; of others the name is enough."""
        return name in self.read or name in ("id", "loss_mask") or name in self.refused or is_instruction(name)

    @classmethod
    def of(cls, attr: Attr) -> "FieldNames":
        own: tuple[tuple[str | None, Role], ...] = (
            (attr.system_tag, "system"),
            (attr.user_tag, "user"),
            (attr.assistant_tag, "assistant"),
            (attr.observation_tag, "tool"),
            (attr.function_tag, "assistant"),
        )
        calls: dict[str, Role] = dict.fromkeys(FUNCTION_CALLS, "assistant")
        names = cls(
            Names(attr.messages, ("messages", "conversations")),
            Names(attr.images, ("images", "image")),
            Names(attr.videos, ("videos", "video")),
            Names(attr.tools, ("tools",)),
            Names(attr.system, ("system",)),
            Names(attr.role_tag, ("role", "from")),
            Names(attr.content_tag, ("content", "value")),
            USUAL_ROLES | calls | {tag: role for tag, role in own if tag},
            frozenset(calls) - {tag for tag, _ in own if tag} | {*([attr.function_tag] if attr.function_tag else [])},
            OF_RECORDS if attr.messages else OF_RECORDS | PREFERENCES,
            frozenset(PREFERENCES if attr.messages else ()),
            frozenset(attr.ignore),
        )
        needed = {*names.read, *names.role.whole_and_parts(), *names.content.whole_and_parts(), *BESIDE_CONTENT}
        if wrong := [name for name in attr.ignore if name in needed]:
            raise SettingError(
                f"data.dataset_param.attr.ignore: {wrong[0]} is read; only what is not read can be ignored"
            )
        return names

    @classmethod
    def llava(cls) -> "FieldNames":
        """Only what LLaVA-Instruct has: anything else is an error."""
        none = Names(None, ())
        others = _refused(("videos video tools system", "LLaVA's records have none", None))
        return cls(
            Names(None, ("conversations",)),
            Names(None, ("image",)),
            none,
            none,
            none,
            Names(None, ("from",)),
            Names(None, ("value",)),
            {"human": "user", "gpt": "assistant"},
            refused=OF_RECORDS | PREFERENCES | others,
        )


def _fields(
    named: tuple[Names, ...], read: Iterable[str], harmless: frozenset[str], refused: Refused, not_read: frozenset[str]
) -> Fields:
    around = frozenset(part for names in named if names.own for part in names.own.split(".")[:-1])
    known = harmless.union(*(names.whole_and_parts() for names in named)) - around
    refused_inside = refused | dict.fromkeys(read, ("it is not read inside another field", None))
    inside = Fields(known, refused_inside, around, not_read) if around else None
    return Fields(known.union(read), refused, around, not_read, inside)
