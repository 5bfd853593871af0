"""The lines of qwen35/log.py without their time, rank and level."""

import re

PREFIX = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (?:(?:rank \d+ )?[A-Z]+: )?", re.MULTILINE)


def plain(text: str) -> str:
    return PREFIX.sub("", text)
