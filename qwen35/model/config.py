"""Reads a checkpoint's config.json; refuses, by name, what the model does not support."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StrictFloat, StrictInt, TypeAdapter, ValidationError

from qwen35.batch import VisionSpec
from qwen35.config.layout import TEXT_ONLY, text_section
from qwen35.errors import read_object
from qwen35.model.config_keys import FAMILY, ConfigError, refuse_quantized, rope_type, shown, unknown_keys

LayerType = Literal["linear_attention", "full_attention"]  # the first is a gated delta net
Size = Annotated[StrictInt, Field(ge=1, le=2**24)]
SizeOrZero = Annotated[StrictInt, Field(ge=0, le=2**24)]
Depth = Annotated[StrictInt, Field(ge=1, le=1000)]  # layers are built one by one
PositiveFloat = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)]
FloatOrZero = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]
WITHOUT_EFFECT = ("initializer_range", "mtp_num_hidden_layers")  # on a model whose weights are loaded
LENGTH = "original_max_position_embeddings"  # of the training, which YaRN extends
T = TypeVar("T")


@dataclass(frozen=True)
class Yarn:
    """Rotary embeddings for contexts that are longer than those of the training, see `rope.py`."""

    factor: PositiveFloat  # how much longer
    original_max_position_embeddings: Size  # the length of the training
    attention_factor: PositiveFloat  # scales cos and sin, and thus the scores by its square
    beta_fast: PositiveFloat  # dimensions that turn more often than this in that length stay as they are
    beta_slow: PositiveFloat  # those that turn less often are slowed down by the whole factor
    truncate: bool  # round the edges between the three kinds to whole dimensions


@dataclass(frozen=True)
class TextConfig:
    vocab_size: Size
    hidden_size: Size
    layer_types: Annotated[tuple[LayerType, ...], Field(min_length=1, max_length=1000)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    linear_num_key_heads: Size
    linear_num_value_heads: Size
    linear_key_head_dim: Size
    linear_value_head_dim: Size
    linear_conv_kernel_dim: Size
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    rotary_dim: int  # leading dimensions of a head that turn
    mrope_section: tuple[int, int, int]  # frequencies of the temporal, height and width positions
    yarn: Yarn | None = None
    initializer_range: PositiveFloat = 0.02
    intermediate_size: SizeOrZero = 0  # dense models only
    num_experts: SizeOrZero = 0  # this and the next three: mixture of experts only
    num_experts_per_tok: SizeOrZero = 0
    moe_intermediate_size: SizeOrZero = 0
    shared_expert_intermediate_size: SizeOrZero = 0
    mtp_num_hidden_layers: SizeOrZero = 0


@dataclass(frozen=True)
class VisionConfig:
    depth: Depth
    hidden_size: Size
    intermediate_size: Size
    num_heads: Size
    in_channels: Size
    patch_size: Size
    temporal_patch_size: Size
    spatial_merge_size: Size
    num_position_embeddings: Size
    out_hidden_size: Size


@dataclass(frozen=True)
class ModelConfig:
    text: TextConfig
    vision: VisionConfig | None  # None: a text-only model
    tie_word_embeddings: bool
    image_token_id: SizeOrZero | None = None  # with a vision tower only
    video_token_id: SizeOrZero | None = None

    @property
    def vision_spec(self) -> VisionSpec | None:
        if self.vision is None or self.image_token_id is None or self.video_token_id is None:
            return None
        side = round(self.vision.num_position_embeddings**0.5)
        return VisionSpec(self.image_token_id, self.video_token_id, self.vision.spatial_merge_size, side)


def check_same(where: object, was: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises ConfigError if `where` is of another config, as asdict gives it."""
    if changed := differences(was, asdict(config)):
        raise ConfigError(f"{where} was made with another config.json ({'; '.join(changed)[:300]}); set the two alike")


def differences(was: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """Values of nested mappings that differ, but those WITHOUT_EFFECT, or that only one has."""
    found = []
    for key, value in now.items():
        old = was.get(key, None if key == "yarn" else value)  # older releases had no YaRN
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            found += differences(old, value, f"{where}{key}.")
        elif old != value and key not in WITHOUT_EFFECT:
            found.append(f"{where}{key}: {old} -> {value}")
    return found


def load_config(source: str | Path | dict[str, Any]) -> ModelConfig:
    """source: a folder with config.json, that file, or its contents. Raises ConfigError."""
    if isinstance(source, dict):
        return _from_dict(source)
    path = Path(source) if Path(source).suffix == ".json" else Path(source) / "config.json"
    config = read_object(path, ConfigError, "not there; a Qwen3.5 checkpoint folder holds config.json")
    try:
        return _from_dict(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@dataclass(frozen=True)
class _Sections:
    text_config: dict[str, Any]
    vision_config: dict[str, Any]


@dataclass(frozen=True)
class _TextKeys:
    """Keys of text_config from which fields of TextConfig are made."""

    head_dim: Size
    num_hidden_layers: Depth | None = None
    full_attention_interval: Size | None = None
    layer_types: list[Any] | None = None


@dataclass(frozen=True)
class _Rope:
    rope_theta: PositiveFloat = 1e4
    partial_rotary_factor: Annotated[PositiveFloat, Field(le=1)] = 0.25
    mrope_section: tuple[SizeOrZero, SizeOrZero, SizeOrZero] = (11, 11, 10)


@dataclass(frozen=True)
class _Yarn:
    """The keys that YaRN reads, and what transformers makes of those that are null, 0 or absent."""

    factor: PositiveFloat | None
    original_max_position_embeddings: Size
    max_position_embeddings: Size
    attention_factor: PositiveFloat | None = None
    beta_fast: FloatOrZero | None = None
    beta_slow: FloatOrZero | None = None
    mscale: FloatOrZero | None = None
    mscale_all_dim: FloatOrZero | None = None
    truncate: bool | None = True

    def resolved(self) -> Yarn:
        factor = self.factor or self.max_position_embeddings / self.original_max_position_embeddings

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        attention, one, all_dim = self.attention_factor, self.mscale, self.mscale_all_dim
        if attention is None:
            attention = scale(one) / scale(all_dim) if one and all_dim else scale(1.0)
        fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0
        return Yarn(factor, self.original_max_position_embeddings, attention, fast, slow, bool(self.truncate))


def _from_dict(config: dict[str, Any]) -> ModelConfig:
    refuse_quantized(config)
    kind = config.get("model_type")
    if kind not in (*FAMILY, *TEXT_ONLY):
        raise ConfigError(f"model_type {shown(kind)} is not one of {', '.join((*FAMILY, *TEXT_ONLY))}")
    has_tower, text = kind in FAMILY, text_section(config)
    vision = _valid(_Sections, config, "").vision_config if has_tower else None
    unknown_keys(config)
    at = "text_config." if has_tower else ""  # where the text model's keys are, for messages
    keys = _valid(_TextKeys, text, at)
    # rope_scaling if not empty, else rope_parameters; text_config has their missing values
    beside = {name: text[name] for name in ("rope_theta", "partial_rotary_factor") if name in text}
    rope = beside | (text.get("rope_scaling") or text.get("rope_parameters") or {})
    turning = _valid(_Rope, rope, f"{at}rope_parameters.")
    longest = text.get("max_position_embeddings") or 32768
    lengths = {LENGTH: text.get(LENGTH) or rope.get(LENGTH) or longest, "max_position_embeddings": longest}
    is_yarn = rope_type(rope) == "yarn"
    text = text | {
        "layer_types": _layer_types(keys, at),
        "yarn": _valid(_Yarn, rope | lengths, f"{at}rope_parameters.").resolved() if is_yarn else None,
        "rope_theta": turning.rope_theta,
        "rotary_dim": int(keys.head_dim * turning.partial_rotary_factor),
        "mrope_section": turning.mrope_section,
    }
    made = {"text": _valid(TextConfig, text, at), "tie_word_embeddings": is_tied(config)}
    tower = {"vision": None if vision is None else _valid(VisionConfig, vision, "vision_config.")}
    tokens = {name: config.get(name) for name in ("image_token_id", "video_token_id") if has_tower}
    model = _valid(ModelConfig, made | tower | tokens, "")
    for violation in _violations(model, kind, at):
        raise ConfigError(violation)
    return model


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding; as in transformers only the top level decides."""
    for where, values in (("", config), ("text_config.", config.get("text_config"))):
        tied = values.get("tie_word_embeddings") if isinstance(values, Mapping) else None
        if not isinstance(tied, bool | None):
            raise ConfigError(f"{where}tie_word_embeddings is {shown(tied)}, not true or false")
    return bool(config.get("tie_word_embeddings"))


def _valid(cls: type[T], values: dict[str, Any], at: str) -> T:
    """The keys of the section `at` that `cls` has. Raises ConfigError for the first wrong one."""
    try:
        return _reader(cls).validate_python(values)  # type: ignore[arg-type]  # mypy: a class is not hashable
    except ValidationError as errors:
        error = errors.errors()[0]
        if error["type"] == "missing":
            raise ConfigError(f"{at.rstrip('.')} lacks {error['loc'][-1]}".strip()) from None
        name = at + ".".join(map(str, error["loc"]))
        problem = error["msg"].replace("Input should be", "not")
        raise ConfigError(f"{name} is {shown(error['input'])}, {problem}") from None


@cache  # making one takes longer than all that is read with it
def _reader(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def _layer_types(keys: _TextKeys, at: str) -> Sequence[str]:
    kinds, count = keys.layer_types, keys.num_hidden_layers
    if kinds is None:
        if count is None:
            raise ConfigError(f"{at.rstrip('.')} lacks num_hidden_layers".strip())
        every = keys.full_attention_interval or 4
        return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    if count not in (None, len(kinds)):
        raise ConfigError(f"{at}num_hidden_layers is {count}, but layer_types has {len(kinds)} layers")
    return kinds


def _violations(config: ModelConfig, kind: str, at: str) -> Iterator[str]:
    """The rules between numbers that do not hold."""
    t, v, is_moe = config.text, config.vision, "moe" in kind
    needed = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
    for name in needed if is_moe else ["intermediate_size"]:
        if not getattr(t, name):
            yield f"{at.rstrip('.')} lacks {name}".strip()
    if t.num_experts and not is_moe:
        yield f"model_type is {kind}, which has no experts, but {at}num_experts is {t.num_experts}"
    if t.num_experts_per_tok > t.num_experts:
        yield f"{at}num_experts_per_tok {t.num_experts_per_tok} is above num_experts {t.num_experts}"
    heads, kv_heads = t.num_attention_heads, t.num_key_value_heads
    if heads % kv_heads:
        yield f"{at}num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
    heads, kv_heads = t.linear_num_value_heads, t.linear_num_key_heads
    if heads % kv_heads:
        yield f"{at}linear_num_value_heads {heads} is no multiple of linear_num_key_heads {kv_heads}"
    if 2 * sum(t.mrope_section) != t.rotary_dim or t.rotary_dim > t.head_dim:
        yield (
            f"{at}rope_parameters: mrope_section {list(t.mrope_section)} must add up to half of the {t.rotary_dim} "
            f"dimensions that turn, head_dim {t.head_dim} x partial_rotary_factor"
        )
    if t.yarn and t.rope_theta <= 1:
        yield f"{at}rope_parameters: YaRN needs a rope_theta above 1, not {t.rope_theta}"
    if v is None:
        return
    if v.hidden_size % (4 * v.num_heads):  # rope halves a head twice
        yield f"vision_config.hidden_size {v.hidden_size} is no multiple of 4 x num_heads {4 * v.num_heads}"
    if math.isqrt(v.num_position_embeddings) ** 2 != v.num_position_embeddings:
        yield f"vision_config.num_position_embeddings {v.num_position_embeddings} is not a square"
    if v.out_hidden_size != t.hidden_size:
        yield f"vision_config.out_hidden_size {v.out_hidden_size} is not text_config.hidden_size {t.hidden_size}"
    for name, number in (("image_token_id", config.image_token_id), ("video_token_id", config.video_token_id)):
        if number is None:
            yield f"lacks {name}"
        elif number >= t.vocab_size:
            yield f"{name} {number} is not below text_config.vocab_size {t.vocab_size}"
    if config.image_token_id == config.video_token_id:
        yield f"image_token_id and video_token_id are both {config.image_token_id}"
