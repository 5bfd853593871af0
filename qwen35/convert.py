"""Weights from Hugging Face to DCP and back: `python -m qwen35.convert hf_to_dcp …`, or `mm-convert`."""

from qwen35.checkpoint.convert import main
from qwen35.console import outlive_readers

if __name__ == "__main__":
    outlive_readers()
    raise SystemExit(main())
