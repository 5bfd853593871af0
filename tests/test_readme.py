"""Both READMEs name every setting, variable and command, and nothing that is not there."""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from qwen35.settings import Settings

ROOT = Path(__file__).parents[1]
READMES = pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])


def last_names(cls: type) -> set[str]:
    """The last part of every setting's path."""
    names = set()
    for name, kind in get_type_hints(cls).items():
        names |= last_names(kind) if dataclasses.is_dataclass(kind) else {name}
    return names


def code(readme: str) -> str:
    """All that stands in `…` or between ``` lines."""
    text = (ROOT / readme).read_text()
    blocks = re.findall(r"```.*?```", text, re.DOTALL)
    return "\n".join(blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


@READMES
def test_every_setting_has_its_line(readme):
    words = set(re.findall(r"\w+", code(readme)))
    missing = last_names(Settings) - words
    assert not missing


@READMES
def test_every_variable_has_its_line(readme):
    names = set(re.findall(r'^: "\$\{(\w+):=', (ROOT / "env.sh").read_text(), re.MULTILINE))
    assert len(names) > 50
    assert not names - set(re.findall(r"\w+", code(readme)))


@READMES
def test_commands_and_files_are_there(readme):
    text = code(readme)
    targets = set(re.findall(r"^([a-z-]+): ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", text))
    assert named <= targets
    assert {
        "install",
        "convert",
        "export",
        "data",
        "show",
        "finetune",
        "generate",
        "evaluate",
        "doctor",
        "test",
    } <= named
    paths = set(re.findall(r"(?<![\w/])(?:configs|scripts|qwen35|kernels|tests)/[\w/.-]+\.(?:sh|py|yaml)\b", text))
    assert len(paths) > 3
    assert [path for path in paths if not (ROOT / path).exists()] == ["scripts/X.sh"]


def test_both_say_the_same():
    """The same headings, tables of the same length, the same blocks of commands but for what is said in words."""
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    for pattern in (r"^#+ ", r"^\|", r"^```", r"^- "):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(re.findall(pattern, chinese, re.MULTILINE)), (
            pattern
        )
    # what can be typed is the same in both, but for the words of a prompt and the comments
    commands = [
        re.findall(r"^(make [^#\n]*?)(?: (?:PROMPT|TORCH_INDEX)=.*)?(?:  .*)?$", text, re.MULTILINE)
        for text in (english, chinese)
    ]
    assert commands[0] == commands[1]
