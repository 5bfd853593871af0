"""Weights from Hugging Face to DCP and back: `python -m qwen35.convert hf_to_dcp …`, or `mm-convert`."""

from qwen35.checkpoint.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
