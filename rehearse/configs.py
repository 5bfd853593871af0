"""The model's config.json: the recipe's own, or if that is missing, the one published."""

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
# Models of Qwen3.5, 3.6 and 3.8 of one size, such as 27B or 2.4T-A95B, have the same shapes.
SIZE = re.compile(r"\d+(?:\.\d+)?[BT](?:-A\d+B)?")


def with_config(settings: Settings) -> tuple[Settings, ModelConfig, str]:
    """-> settings that name an existing config, the config, its source.

    Raises SettingError, ConfigError.
    """
    folder = settings.model.model_name_or_path
    if Path(folder, "config.json").exists():
        return settings, load_config(folder), f"{folder}/config.json"
    sizes = {path.stem: path for path in sorted(PUBLISHED.glob("**/*.json"), key=_parameters)}
    words = SIZE.findall(Path(folder).name)
    if not words or words[-1] not in sizes:
        raise SettingError(
            f"model.model_name_or_path: {folder} does not exist, and its name ends in none of the published sizes "
            f"{', '.join(sizes)}; make download fetches a model"
        )
    path = sizes[words[-1]]
    model = replace(settings.model, model_name_or_path=str(path))
    config = "published config" if path.parent == PUBLISHED else "reconstructed config"
    source = f"the {config} of {path.stem}, since {folder} does not exist"
    return replace(settings, model=model), load_config(path), source


def _parameters(path: Path) -> float:
    number, unit, _ = re.split("([BT])", path.stem, maxsplit=1)
    return float(number) * {"B": 1, "T": 1000}[unit]


def some_layers(size: str, layer_types: Sequence[str], text: Mapping[str, Any]) -> dict[str, Any]:
    """The published config.json of a size, with these layers and one block of its vision tower.

    `text` replaces fields of text_config. Image and video tokens are 2 and 3, in any vocabulary.
    """
    config = json.loads((PUBLISHED / f"{size}.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"layer_types": list(layer_types), "num_hidden_layers": len(layer_types), **text}
    config["vision_config"] |= {"depth": 1}
    return config | {"image_token_id": 2, "video_token_id": 3}
