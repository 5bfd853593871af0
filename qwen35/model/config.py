"""What the model needs of a checkpoint's config.json. What it cannot do is refused by name."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from qwen35.batch import VisionSpec

MODEL_TYPES = ("qwen3_5", "qwen3_5_moe")


class ConfigError(ValueError):
    """A config.json that is not of a Qwen3.5, or that asks for something the model does not do."""


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
    intermediate_size: int = 0  # dense
    num_experts: int = 0  # mixture of experts, and what follows
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
    """A folder with config.json, that file, or its contents -> ModelConfig. Raises ConfigError."""
    if isinstance(source, dict):
        return _from_dict(source)
    path = Path(source)
    path = path if path.suffix == ".json" else path / "config.json"
    try:
        return _from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{path}: not there; a Qwen3.5 checkpoint folder holds config.json") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except KeyError as error:
        raise ConfigError(f"{path}: lacks {error.args[0]}") from None


def _from_dict(config: dict[str, Any]) -> ModelConfig:
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in MODEL_TYPES:
        raise ConfigError(f"model_type {kind!r} is not one of {', '.join(MODEL_TYPES)}")
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    rope = text.get("rope_parameters") or {}
    for name, value, only in (
        ("text_config.hidden_act", text.get("hidden_act", "silu"), "silu"),
        ("text_config.attention_bias", text.get("attention_bias", False), False),
        ("text_config.attention_dropout", text.get("attention_dropout", 0.0), 0.0),
        ("text_config.mlp_only_layers", text.get("mlp_only_layers") or [], []),
        ("text_config.rope_parameters.rope_type", rope.get("rope_type", "default"), "default"),
        ("vision_config.hidden_act", vision.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
        ("vision_config.deepstack_visual_indexes", vision.get("deepstack_visual_indexes") or [], []),
    ):
        if value != only:
            raise ConfigError(f"{name} is {value!r}; this model does {only!r} only")
    if "layer_types" not in text:
        every = text.get("full_attention_interval", 4)
        kinds = (
            "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(text["num_hidden_layers"])
        )
        text["layer_types"] = list(kinds)
    text |= {
        "rope_theta": rope.get("rope_theta", 1e7),
        "rotary_dim": int(text["head_dim"] * rope.get("partial_rotary_factor", 0.25)),
        "mrope_section": rope.get("mrope_section", [11, 11, 10]),
        "initializer_range": text.get("initializer_range", 0.02),
    }
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    return ModelConfig(
        text=_take(TextConfig, text, "text_config"),
        vision=_take(VisionConfig, vision, "vision_config"),
        tie_word_embeddings=tied,
        image_token_id=config["image_token_id"],
        video_token_id=config["video_token_id"],
    )


def _take(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    names = [f.name for f in fields(cls)]
    taken: dict[str, Any] = {
        n: tuple(values[n]) if isinstance(values[n], list) else values[n] for n in names if n in values
    }
    try:
        return cls(**taken)
    except TypeError as error:
        missing = str(error).partition("argument")[2].strip(" s:")
        raise ConfigError(f"{where} lacks {missing}") from None
