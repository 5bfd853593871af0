"""Weights and training states on disk: Hugging Face folders, DCP folders, conversion."""

from qwen35.checkpoint.hf import load_pretrained

__all__ = ["load_pretrained"]
