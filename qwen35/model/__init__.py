"""The plain model: no files, no processes, no device words. `from qwen35.model import Qwen35`."""

from qwen35.model.config import ConfigError, ModelConfig, TextConfig, VisionConfig, load_config
from qwen35.model.qwen35 import Qwen35

__all__ = ["ConfigError", "ModelConfig", "Qwen35", "TextConfig", "VisionConfig", "load_config"]
