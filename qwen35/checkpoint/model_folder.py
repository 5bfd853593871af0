"""A model folder's config.json, and what is refused: adapters and quantized weights."""

import re
from pathlib import Path
from typing import Any

from qwen35.checkpoint.errors import CheckpointError
from qwen35.errors import read_object
from qwen35.model.config_keys import ConfigError, refuse_quantized

CONFIG = "config.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTIZED = re.compile(r"(hf_quant_config|quant(ize)?_config|quant_model_description.*)\.json")
MERGE = "merge it first (peft: merge_and_unload, then save_pretrained) and bring what that saves"


def refuse_unsupported(folder: Path) -> None:
    """Raises CheckpointError or ConfigError for an adapter or quantized weights."""
    for name in ADAPTERS:
        if (folder / name).is_file():
            what = "an adapter beside the model" if (folder / CONFIG).is_file() else "an adapter, not a model"
            raise CheckpointError(f"{folder}: {name} is {what}; {MERGE}, or move it away")
    for path in sorted(folder.glob("*.json")):
        if QUANTIZED.fullmatch(path.name):
            raise CheckpointError(
                f"{folder}: {path.name} says that the weights are quantized, and those cannot be trained; bring the bf16 "
                "checkpoint, or move the file away if the weights are bf16 all the same"
            )
    if (folder / CONFIG).is_file():
        try:
            refuse_quantized(config_of(folder))
        except ConfigError as error:
            raise ConfigError(f"{folder / CONFIG}: {error}") from None


def config_of(folder: Path) -> dict[str, Any]:
    return read_object(folder / CONFIG, CheckpointError, "not there; a Qwen3.5 checkpoint folder holds config.json")
