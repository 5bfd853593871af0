"""The program behind `mm-convert` and `python -m qwen35.convert`; see checkpoint/convert.py."""

from qwen35.checkpoint.convert import main
from qwen35.console import outlive_readers


def program() -> int:
    outlive_readers()
    return main()


if __name__ == "__main__":
    raise SystemExit(program())
