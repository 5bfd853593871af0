"""The model's config.json: of the recipe's own folder, or where that is not there, the published one of that size."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen35.config.schema import Settings
from qwen35.errors import SettingError
from qwen35.model import ModelConfig, load_config

PUBLISHED = Path(__file__).parents[1] / "assets/configs"


def with_config(settings: Settings) -> tuple[Settings, ModelConfig, str]:
    """-> the settings with a config.json that is there, the config, and where it is from. Raises SettingError, ConfigError."""
    folder = settings.model.model_name_or_path
    if Path(folder, "config.json").exists():
        return settings, load_config(folder), f"{folder}/config.json"
    sizes = {path.stem: path for path in PUBLISHED.glob("*.json")}
    words = re.findall(r"\d+(?:\.\d+)?B(?:-A\d+B)?", Path(folder).name)
    if not words or words[-1] not in sizes:
        raise SettingError(
            f"model.model_name_or_path {folder} is not there, and its name ends in none of the published sizes "
            f"{', '.join(sorted(sizes, key=lambda s: float(s.partition('B')[0])))}: make download brings a model"
        )
    path = sizes[words[-1]]
    model = replace(settings.model, model_name_or_path=str(path))
    source = f"the published config of {path.stem}, since {folder} is not there"
    return replace(settings, model=model), load_config(path), source


def some_layers(
    size: str, layer_types: Sequence[str], text: Mapping[str, Any], tower: Mapping[str, Any]
) -> dict[str, Any]:
    """The published config.json of a size with these layers alone, and one block of its vision tower.

    `text` and `tower` replace what they name; the tokens of images and videos are 2 and 3, in any vocabulary.
    """
    config = json.loads((PUBLISHED / f"{size}.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"layer_types": list(layer_types), "num_hidden_layers": len(layer_types), **text}
    config["vision_config"] |= {"depth": 1, **tower, "out_hidden_size": config["text_config"]["hidden_size"]}
    return config | {"image_token_id": 2, "video_token_id": 3}
