"""Weights and training states on disk: Hugging Face folders (hf), DCP folders (dcp), the way between them (convert)."""

from qwen35.checkpoint.hf import load_pretrained

__all__ = ["load_pretrained"]
