"""Reads a checkpoint's config.json; refuses, by name, what the model does not support."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from qwen35.batch import VisionSpec
from qwen35.errors import read_object
from qwen35.model.config_keys import FAMILY, ConfigError, refuse_quantized, shown, unknown_keys

LAYER_TYPES = ("linear_attention", "full_attention")
TEXT_ROPE = "text_config.rope_parameters"
MAX_VALUES = {"depth": 1000, "num_hidden_layers": 1000}  # layers are built one by one; other sizes: 2**24


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]  # "linear_attention" (gated delta net) or "full_attention"
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int  # leading dimensions of a head that turn
    mrope_section: tuple[int, int, int]  # frequencies of the temporal, height and width positions
    initializer_range: float
    intermediate_size: int = 0  # dense models only
    num_experts: int = 0  # this and the next three: mixture of experts only
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    mtp_num_hidden_layers: int = 0


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    out_hidden_size: int


Config = TypeVar("Config", TextConfig, VisionConfig)


@dataclass(frozen=True)
class ModelConfig:
    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int

    @property
    def vision_spec(self) -> VisionSpec:
        side = round(self.vision.num_position_embeddings**0.5)
        return VisionSpec(self.image_token_id, self.video_token_id, self.vision.spatial_merge_size, side)


def load_config(source: str | Path | dict[str, Any]) -> ModelConfig:
    """source: a folder with config.json, that file, or its contents. Raises ConfigError."""
    if isinstance(source, dict):
        return _from_dict(source)
    path = Path(source)
    path = path if path.suffix == ".json" else path / "config.json"
    config = read_object(path, ConfigError, "not there; a Qwen3.5 checkpoint folder holds config.json")
    try:
        return _from_dict(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _from_dict(config: dict[str, Any]) -> ModelConfig:
    refuse_quantized(config)
    kind = config.get("model_type")
    if kind not in FAMILY:
        raise ConfigError(f"model_type {shown(kind)} is not one of {', '.join(FAMILY)}")
    text, vision = dict(_section(config, "text_config")), _section(config, "vision_config")
    unknown_keys(config)
    rope = _rope(text)
    text |= {
        "layer_types": _layer_types(text),
        "rope_theta": _number(rope, "rope_theta", 1e4, f"{TEXT_ROPE}."),
        "rotary_dim": int(
            _size(text, "head_dim", "text_config.") * _number(rope, "partial_rotary_factor", 0.25, f"{TEXT_ROPE}.")
        ),
        "mrope_section": _sections(rope.get("mrope_section", [11, 11, 10])),
        "initializer_range": text.get("initializer_range", 0.02),
    }
    made = ModelConfig(
        text=_take(TextConfig, text, "text_config"),
        vision=_take(VisionConfig, vision, "vision_config"),
        tie_word_embeddings=is_tied(config),
        image_token_id=_size(config, "image_token_id", least=0),
        video_token_id=_size(config, "video_token_id", least=0),
    )
    _check(made, is_moe=kind == "qwen3_5_moe")
    return made


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding; as in transformers only the top level decides."""
    for where, values in (("", config), ("text_config.", config.get("text_config"))):
        tied = values.get("tie_word_embeddings") if isinstance(values, Mapping) else None
        if not isinstance(tied, bool | None):
            raise ConfigError(f"{where}tie_word_embeddings is {shown(tied)}, not true or false")
    return bool(config.get("tie_word_embeddings"))


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """rope_scaling if not empty, else rope_parameters; text_config has their missing values."""
    beside = {name: text[name] for name in ("rope_theta", "partial_rotary_factor") if name in text}
    return beside | (text.get("rope_scaling") or text.get("rope_parameters") or {})


def _check(config: ModelConfig, is_moe: bool) -> None:
    """Check the rules between numbers. Raises ConfigError."""
    t, v = config.text, config.vision
    needed = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
    for name in needed if is_moe else ["intermediate_size"]:
        if not getattr(t, name):
            raise ConfigError(f"text_config lacks {name}")
    if t.num_experts and not is_moe:
        raise ConfigError(
            f"model_type is qwen3_5, which has no experts, but text_config.num_experts is {t.num_experts}"
        )
    for name, total, of, part in (
        ("text_config.num_attention_heads", t.num_attention_heads, "num_key_value_heads", t.num_key_value_heads),
        (
            "text_config.linear_num_value_heads",
            t.linear_num_value_heads,
            "linear_num_key_heads",
            t.linear_num_key_heads,
        ),
        ("vision_config.hidden_size", v.hidden_size, "4 x num_heads", 4 * v.num_heads),  # rope halves a head twice
    ):
        if total % part:
            raise ConfigError(f"{name} {total} is no multiple of {of} {part}")
    if t.num_experts_per_tok > t.num_experts:
        raise ConfigError(
            f"text_config.num_experts_per_tok {t.num_experts_per_tok} is above num_experts {t.num_experts}"
        )
    if 2 * sum(t.mrope_section) != t.rotary_dim or t.rotary_dim > t.head_dim:
        raise ConfigError(
            f"text_config.rope_parameters: mrope_section {list(t.mrope_section)} must add up to half of the {t.rotary_dim} "
            f"dimensions that turn, head_dim {t.head_dim} x partial_rotary_factor"
        )
    if math.isqrt(v.num_position_embeddings) ** 2 != v.num_position_embeddings:
        raise ConfigError(f"vision_config.num_position_embeddings {v.num_position_embeddings} is not a square")
    if v.out_hidden_size != t.hidden_size:
        raise ConfigError(
            f"vision_config.out_hidden_size {v.out_hidden_size} is not text_config.hidden_size {t.hidden_size}"
        )
    for name in ("image_token_id", "video_token_id"):
        if getattr(config, name) >= t.vocab_size:
            raise ConfigError(f"{name} {getattr(config, name)} is not below text_config.vocab_size {t.vocab_size}")
    if config.image_token_id == config.video_token_id:
        raise ConfigError(f"image_token_id and video_token_id are both {config.image_token_id}")


def _section(values: Mapping[str, Any], name: str, where: str = "") -> dict[str, Any]:
    value = values.get(name)
    if value is None:
        raise ConfigError(f"lacks {name}")
    if not isinstance(value, dict):
        raise ConfigError(f"{where}{name} is {shown(value)}, not an object")
    return value


def _size(values: Mapping[str, Any], name: str, where: str = "", least: int = 1) -> int:
    if name not in values:
        raise ConfigError(f"{where.rstrip('.') + ' ' if where else ''}lacks {name}")
    value, largest = values[name], MAX_VALUES.get(name, 2**24)
    if type(value) is not int or not least <= value <= largest:
        raise ConfigError(f"{where}{name} is {shown(value)}, not a whole number from {least} to {largest}")
    return value


def _number(values: Mapping[str, Any], name: str, default: float | None = None, where: str = "") -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{where}{name} is {shown(value)}, not a number above 0")
    return value


def _layer_types(text: dict[str, Any]) -> tuple[str, ...]:
    kinds = text.get("layer_types")
    if kinds is None:
        every, count = text.get("full_attention_interval", 4), _size(text, "num_hidden_layers", "text_config.")
        if type(every) is not int or every < 1:
            raise ConfigError(f"text_config.full_attention_interval is {shown(every)}, not a whole number from 1")
        return tuple(LAYER_TYPES[(i + 1) % every == 0] for i in range(count))
    if not isinstance(kinds, list) or not kinds or any(kind not in LAYER_TYPES for kind in kinds):
        raise ConfigError(f"text_config.layer_types is {shown(kinds)}, not a list of {' and '.join(LAYER_TYPES)}")
    if _size({"num_hidden_layers": len(kinds), **text}, "num_hidden_layers", "text_config.") != len(kinds):
        raise ConfigError(
            f"text_config.num_hidden_layers is {text['num_hidden_layers']}, but layer_types has {len(kinds)} layers"
        )
    return tuple(kinds)


def _sections(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != 3 or any(type(n) is not int or n < 0 for n in value):
        raise ConfigError(
            f"text_config.rope_parameters.mrope_section is {shown(value)}, not a list of three whole numbers"
        )
    return tuple(value)


def _take(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """Build `cls` from `values`, checking that ints are whole numbers and floats are above 0."""
    taken: dict[str, Any] = {}
    for f in fields(cls):
        if f.name in values or f.default is MISSING:
            taken[f.name] = _checked(f, values, f"{where}.")
    return cls(**taken)


def _checked(f: Field, values: dict[str, Any], where: str) -> Any:
    if f.type is int:
        return _size(values, f.name, where, least=1 if f.default is MISSING else 0)
    return _number(values, f.name, None, where) if f.type is float else values[f.name]
