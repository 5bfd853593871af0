"""Which fields of a record are read, under the names in attr or the usual ones; what others mean.

A field that is not read might say what to train. So every field is either read, known to be
harmless, refused with an error, or counted as unread; none is dropped silently.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap
from typing import Any

from qwen35.config.schema import Attr
from qwen35.data.record import RecordError, Role
from qwen35.errors import SettingError

USUAL_ROLES: dict[str, Role] = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")  # of assistant turns that hold only calls, in ShareGPT and ms-swift
LOSS_FIELDS = ("loss_mask", "loss", "train", "trainable", "weight", "loss_scale")  # 1 or 0: whether a turn is trained
BESIDE_CONTENT = ("reasoning_content", "tool_calls", "tool_call_id", "name")  # other fields of a turn
SIZE_LIMITS = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
VIDEO_LIMITS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")

# Field -> (what the user should do, the value that changes nothing). A field listed here is an
# error unless it is empty or has that value.
Refused = dict[str, tuple[str, Any]]


def _refused(*rows: tuple[str, str, Any]) -> Refused:
    """rows: (names separated by spaces, what the user should do, harmless value)."""
    return {name: (todo, harmless) for names, todo, harmless in rows for name in names.split()}


def _harmless(**names_by_reason: str) -> frozenset[str]:
    return frozenset(name for names in names_by_reason.values() for name in names.split())


PREFERENCES = _refused(
    (
        "chosen rejected rejected_messages rejected_response rejected_images",
        "training.stage: dpo learns from preference pairs; without it attr.messages says which field holds the turns to train",
        None,
    ),
)
SHARED = ("images", "videos", "tools")  # by both answers of a pair: rejected_images, if there, equals images
ANSWERS = ("chosen",), ("rejected", "rejected_response", "rejected_messages")  # names of the two answers of a pair
FOR_ALL = "preprocess_parameters apply to all records"
REFUSED_IN_RECORDS = _refused(
    ("label kto_tag", "only records with good answers can be trained; leave the others out", True),
    ("mask", "loss_mask, a list with 1 or 0 for each turn, says which are trained", None),
    ("loss train trainable loss_scale", "loss_mask, a list with 1 or 0 for each turn, says which are trained", True),
    ("weight", "a record has no weight; a file has one, in dataset", 1),
    ("audio audios", "audio is not supported", None),
    ("functions", "functions are read from the field tools", None),
    ("system_prompt system_message", "attr.system says which field holds the system prompt", None),
    ("chat_template_kwargs enable_thinking", "enable_thinking is a setting for all records", None),
    ("continue_final_message add_generation_prompt", "an answer is always trained from beginning to end", False),
    (" ".join(SIZE_LIMITS + VIDEO_LIMITS), FOR_ALL, None),
)
REFUSED_IN_TURNS = _refused(
    ("function_call tool_call", "calls are read from tool_calls", None),
    ("reasoning thinking thought think", "thoughts are read from reasoning_content", None),
    ("refusal", "the text of a refusal belongs in the content", None),
    ("prefix partial", "an answer is always trained from its beginning", False),
    ("channel", "thoughts are read from reasoning_content, and every answer is trained as final", "final"),
    ("mask label", "loss_mask with 1 or 0 says whether a turn is trained", None),
    ("image images video videos", "they are read from a content list, or from the record's field", None),
    ("audio audios", "audio is not supported", None),
    ("tools functions", "functions are read from the record's field tools", None),
)
REFUSED_IN_ITEMS = _refused(
    (" ".join(SIZE_LIMITS + VIDEO_LIMITS), FOR_ALL, None),
    ("start end start_time end_time", "a video is always used from start to end", None),
)
REFUSED_AROUND_CALLS = _refused(("arguments", "in a call with a function object they belong in that object", None))
REFUSED_IN_CALLS = _refused(
    ("parameters params input args kwargs", "the arguments of a call are read from arguments", None)
)

DESCRIPTION = _harmless(
    identity="id idx index uid uuid hash title question_id sample_id conversation_id prompt_id message_id turn_id parent_id",
    origin="source data_source dataset dataset_name origin url license model timestamp date created_at",
    subject="language lang category topic domain task task_type tags difficulty ability metadata meta extra_info",
    quality="score scores quality rating",
    size="width height image_size num_turns num_tokens token_count tokens",
)
HARMLESS_IN_RECORDS = DESCRIPTION | _harmless(
    reinforcement_learning="solution ground_truth reward reward_model margin",
    name_of_a_loss_curve="channel",
    api_response="parallel_tool_calls",
)
HARMLESS_IN_PAIRS = _harmless(
    quality=" ".join(f"{x}_{y} {y}_{x}" for x in ("chosen", "rejected") for y in ("score", "rating", "model")),
    compared_in_preference_py=" ".join(f"rejected_{name}" for name in SHARED),
)
HARMLESS_IN_TURNS = DESCRIPTION | _harmless(api_response="type annotations cache_control")
HARMLESS_IN_ITEMS = _harmless(api_request="id index annotations cache_control detail")
HARMLESS_IN_CALLS = _harmless(identity="id index type")

# A field of any other name is an error if it contains one of these words: loss_masks, isTrainable.
INSTRUCTION = re.compile(
    r"(un|non)?(mask|label|loss|weight|reject|choose|chosen|prefer|train|supervise|ignore|skip|exclude|object|b?box)"
    r"(s|es|d|ed|red|ing|able|ence)?",
    re.IGNORECASE,
)
WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+")


def is_instruction(name: str) -> bool:
    """Whether a field's name looks like an instruction about training."""
    return any(map(INSTRUCTION.fullmatch, WORD.findall(name)))


def is_nothing(value: Any) -> bool:
    """Whether a value is null or empty, also inside; Arrow tables fill in such values."""
    if isinstance(value, dict):
        return all(map(is_nothing, value.values()))
    return all(map(is_nothing, value)) if isinstance(value, list) else value is None or value in ("", b"")


@dataclass(frozen=True)
class Names:
    """The names that one field may have."""

    own: str | None  # given in attr; `message.content` is the field content of the object message
    usual: tuple[str, ...]

    def find(self, raw: Mapping[str, Any], source: str) -> tuple[str, Any] | None:
        """(name, value) of the field, or None. Raises RecordError if several names have a value."""
        if self.own is not None and (value := inside(raw, self.own)) is not None:
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

    def passed_over(self, raw: Mapping[str, Any]) -> list[str]:
        """The usual names that have a value too where the own name, which counts, has one."""
        if self.own is None or inside(raw, self.own) is None:
            return []
        return [name for name in self.usual if name != self.own and not is_nothing(raw.get(name))]

    def all_names(self) -> Iterator[str]:
        """All names; for a dotted one also its parts."""
        yield from self.usual
        if self.own is not None:
            yield from (self.own, *self.own.split("."))

    def __str__(self) -> str:
        return " or ".join(name for name in (self.own, *self.usual) if name is not None)


@dataclass(frozen=True)
class Fields:
    """How the fields of one kind of object (record, turn, content item, call) are treated."""

    known: frozenset[str]  # read, or harmless
    refused: Refused
    around: frozenset[str] = frozenset()  # objects that hold a known field, from dotted names in attr
    not_read: frozenset[str] = frozenset()  # counted as unread even if they look like instructions
    inside: "Fields | None" = None  # how the fields of the objects in `around` are treated
    named: tuple[Names, ...] = ()  # those that attr renames

    def unread(self, raw: Mapping[str, Any], where: str, ignored: frozenset[str]) -> Iterator[str]:
        """The non-empty fields that are neither known nor `ignored`.

        Raises RecordError for a field that is refused or looks like an instruction.
        """
        for names in self.named:
            yield from (name for name in names.passed_over(raw) if name not in ignored)
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
                        f"{where}: has {str(name)[:80]}, which is not read but looks like an instruction about training; "
                        "if it is not one, list it in attr.ignore"
                    )
                yield name


def inside(raw: Any, name: str) -> Any:
    """The value of a field, whose name may be dotted; None if there is none."""
    if isinstance(raw, Mapping) and raw.get(name) is not None:
        return raw[name]
    for part in name.split("."):
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


@dataclass(frozen=True)
class FieldNames:
    """The names of all fields that are read, and how the others are treated."""

    messages: Names
    images: Names
    videos: Names
    tools: Names
    system: Names
    role: Names
    content: Names
    roles: Mapping[str, Role]
    calls: frozenset[str]  # roles whose content is a tool call
    alpaca: tuple[Names, ...]  # prompt, query, response, history
    is_alpaca: bool  # these are read in place of messages
    bbox_format: str
    refused: Refused  # of records
    not_read: frozenset[str]
    ignored: frozenset[str]  # attr.ignore
    answers: tuple[Names, ...] = ()  # of pairs: chosen, rejected
    prompt: Names = Names(None, ())  # of pairs, and not in Alpaca's form

    @cached_property
    def plain(self) -> frozenset[str]:
        """The fields of a turn that holds only text; nearly all turns take this short cut."""
        return frozenset(self.role.usual + self.content.usual)

    @cached_property
    def loss(self) -> frozenset[str]:
        """The fields of a turn that say whether it is trained."""
        return frozenset(LOSS_FIELDS) - self.ignored

    @property
    def named(self) -> tuple[Names, ...]:
        """Those of a record."""
        return (
            *(self.alpaca if self.is_alpaca else (self.messages,)),
            self.images,
            self.videos,
            self.tools,
            self.system,
            *self.answers,
            self.prompt,
        )

    @cached_property
    def read(self) -> frozenset[str]:
        """The fields of a record that are read, or are objects around one that is."""
        return frozenset(name for names in self.named for name in names.all_names())

    @cached_property
    def fixed(self) -> tuple[str, ...]:
        """The fields of a record that are read under one name, unless attr has that for another."""
        return tuple(name for name in ("loss_mask", "objects") if name not in self.read | self.ignored)

    @cached_property
    def of_record(self) -> Fields:
        harmless = HARMLESS_IN_RECORDS | HARMLESS_IN_PAIRS if self.answers else HARMLESS_IN_RECORDS
        return _fields(self.named, self.fixed, harmless, self.refused, self.not_read)

    def reads_unnamed(self, raw: Mapping[str, Any]) -> bool:
        """Whether an Alpaca record has input or history where attr names only other columns."""
        _, query, _, history = self.alpaca
        rest = [name for column in (query, history) if column.own is None for name in column.usual]
        return any(column.own for column in self.alpaca) and not all(is_nothing(raw.get(name)) for name in rest)

    @cached_property
    def of_turn(self) -> Fields:
        return _fields(
            (self.role, self.content), (*BESIDE_CONTENT, *LOSS_FIELDS), HARMLESS_IN_TURNS, REFUSED_IN_TURNS, frozenset()
        )

    def needs_value(self, name: str) -> bool:
        """Whether the value of a record's field matters; of other fields only the name is used."""
        return name in self.read or name in ("id", *self.fixed) or name in self.refused or is_instruction(name)

    @classmethod
    def of(cls, attr: Attr, pairs: bool = False) -> "FieldNames":
        """pairs: each record is a preference pair. Raises SettingError."""
        tags: tuple[tuple[str | None, Role], ...] = (
            (attr.system_tag, "system"),
            (attr.user_tag, "user"),
            (attr.assistant_tag, "assistant"),
            (attr.observation_tag, "tool"),
            (attr.function_tag, "assistant"),
        )
        columns = (
            (attr.prompt, "instruction"),
            (attr.query, "input"),
            (attr.response, "output"),
            (attr.history, "history"),
        )
        calls: dict[str, Role] = dict.fromkeys(CALL_ROLES, "assistant")
        names = cls(
            Names(attr.messages, ("messages", "conversations")),
            Names(attr.images, ("images", "image")),
            Names(attr.videos, ("videos", "video")),
            Names(attr.tools, ("tools",)),
            Names(attr.system, ("system",)),
            Names(attr.role_tag, ("role", "from")),
            Names(attr.content_tag, ("content", "value")),
            USUAL_ROLES | calls | {tag: role for tag, role in tags if tag},
            frozenset(calls) - {tag for tag, _ in tags if tag} | {*([attr.function_tag] if attr.function_tag else [])},
            tuple(Names(own, (usual,)) for own, usual in columns),
            attr.format == "alpaca",
            attr.bbox_format,
            REFUSED_IN_RECORDS if attr.messages or pairs else REFUSED_IN_RECORDS | PREFERENCES,
            frozenset(PREFERENCES if attr.messages and not pairs else ()),
            frozenset(attr.ignore),
            tuple(starmap(Names, zip((attr.chosen, attr.rejected), ANSWERS, strict=True))) if pairs else (),
            Names(attr.prompt, ("prompt",) * (pairs and attr.format == "sharegpt" and "prompt" not in attr.ignore)),
        )
        needed = {*names.read, *names.role.all_names(), *names.content.all_names(), *BESIDE_CONTENT}
        if wrong := [name for name in attr.ignore if name in needed]:
            raise SettingError(
                f"data.dataset_param.attr.ignore: {wrong[0]} is read; only fields that are not read can be ignored"
            )
        return names


def _fields(
    named: tuple[Names, ...], read: Iterable[str], harmless: frozenset[str], refused: Refused, not_read: frozenset[str]
) -> Fields:
    """named: fields that attr may rename; read: fields that have one fixed name."""
    around = frozenset(part for names in named if names.own for part in names.own.split(".")[:-1])
    known = harmless.union(*(names.all_names() for names in named)) - around
    refused_inside = refused | dict.fromkeys(read, ("it is not read inside another field", None))
    inside = Fields(known, refused_inside, around, not_read) if around else None
    return Fields(known.union(read), refused, around, not_read, inside, tuple(names for names in named if names.own))
