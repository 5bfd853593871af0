"""Checkpoints: Hugging Face folders (hf) and DCP folders (dcp), and the way between them (convert)."""

from qwen35.checkpoint.dcp import (
    DCPSource,
    Loaded,
    load_checkpoint,
    newest_checkpoint,
    resolve_load,
    save_checkpoint,
)
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf import HFFolder, HFSource, disk_spec, load_hf, load_pretrained, places, save_hf, write_hf
from qwen35.checkpoint.release import write_release

__all__ = [
    "CheckpointError",
    "DCPSource",
    "HFFolder",
    "HFSource",
    "Loaded",
    "disk_spec",
    "load_checkpoint",
    "load_hf",
    "load_pretrained",
    "newest_checkpoint",
    "places",
    "resolve_load",
    "save_checkpoint",
    "save_hf",
    "write_hf",
    "write_release",
]
