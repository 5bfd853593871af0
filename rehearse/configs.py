"""The model's config.json: of the recipe's own folder, or where that is not there, the published one of that size."""

import re
from pathlib import Path

from qwen35.errors import SettingError
from qwen35.model import ModelConfig, load_config

PUBLISHED = Path(__file__).parents[1] / "assets/configs"


def find_config(folder: str) -> tuple[ModelConfig, str]:
    """-> the config, and where it is from. Raises SettingError, ConfigError."""
    if Path(folder, "config.json").exists():
        return load_config(folder), f"{folder}/config.json"
    sizes = {path.stem: path for path in PUBLISHED.glob("*.json")}
    words = re.findall(r"\d+(?:\.\d+)?B(?:-A\d+B)?", Path(folder).name)
    if not words or words[-1] not in sizes:
        raise SettingError(
            f"model.model_name_or_path {folder} is not there, and its name ends in none of the published sizes "
            f"{', '.join(sorted(sizes, key=lambda s: float(s.partition('B')[0])))}: make download brings a model"
        )
    return load_config(sizes[words[-1]]), f"the published config of {words[-1]}, since {folder} is not there"
