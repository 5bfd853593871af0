"""docs/settings.md and docs/environment.md, generated from the settings' own file and env.sh.

A setting's text is the comment on its line, or above it; a variable's is the comment above it.
"""

import ast
import dataclasses
import inspect
import re
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from qwen35.config.schema import DatasetFile, DatasetParam, Entry, Settings

ROOT = Path(__file__).parents[1]
SETTINGS = """# Settings

Every setting of a recipe. `make docs` generates this page from the types, defaults and comments in
`qwen35/config/schema.py`: edit those.

A recipe is a YAML file without aliases, and `a.b=c` in `ARGS` overrides it. A name that is no setting is an error that
names the nearest one. `python -m qwen35.config.load RECIPE` prints all of a recipe, resolved."""
ENVIRONMENT = """# Environment variables

Every variable of `env.sh`. `make docs` generates this page from that file: edit that one. What is set outside of it
wins. Values are checked before anything starts. A default of `-` is empty in `env.sh`, and the variable stays unset."""
WORDS = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", DatasetFile: "list of files"}


def comments(path: Path) -> dict[tuple[str, str], str]:
    """(class, field) -> its comment in a file of dataclasses."""
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    said = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    alone = {row for row in said if path.read_text().splitlines()[row - 1].lstrip().startswith("#")}
    found = {}
    for node in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                above = item.lineno
                while above - 1 in alone:
                    above -= 1
                lines = range(above, (item.end_lineno or item.lineno) + 1)
                found[node.name, item.target.id] = " ".join(said[row] for row in lines if row in said)
    return found


BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to", "multiple_of": "in steps of"}


def values(kind: Any) -> str:
    """What a setting of a type may be, with its bounds."""
    if get_origin(kind) is Annotated:
        limits = [limit for part in kind.__metadata__ for limit in getattr(part, "metadata", ())]
        words = [f"{BOUNDS[name]} {value}" for limit in limits for name, value in dataclasses.asdict(limit).items()]
        return " ".join([values(get_args(kind)[0]), *words])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(kind))
    if get_origin(kind) is tuple:
        return WORDS[DatasetFile] if get_args(kind)[0] is Entry else "list"
    if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping):
        return "mapping"
    return ", ".join(values(k) for k in get_args(kind) if k is not type(None)) or WORDS[kind]


def default(f: "dataclasses.Field[Any]") -> str:
    if f.default is dataclasses.MISSING:
        return "required" if f.default_factory is dataclasses.MISSING else "none"
    if f.default in (None, ()):
        return "none"
    value = list(f.default) if isinstance(f.default, tuple) else f.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def rows(cls: type, path: str, said: Mapping[tuple[str, str], str]) -> Iterator[tuple[str, list[str]]]:
    """(section, cells) of each setting below a dataclass."""
    for f in dataclasses.fields(cls):
        kind = get_type_hints(cls, include_extras=True)[f.name]
        inner = next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and dataclasses.is_dataclass(k)), None)
        if inner and kind is inner:
            yield from rows(inner, f"{path}{f.name}.", said)
        else:
            text = said[cls.__name__, f.name].replace("|", "\\|")
            yield path, [f"`{f.name}`", default(f), "a section" if inner else values(kind), text]
            if inner and inner is not DatasetParam:  # the validation set's settings are the training set's
                yield from rows(inner, f"{path}{f.name}.", said)


def table(head: str, lines: list[list[str]]) -> list[str]:
    return ["", head, "| --- " * len(lines[0]) + "|", *(f"| {' | '.join(cells)} |" for cells in lines)]


def settings_page() -> str:
    page = [SETTINGS]
    sections: dict[str, list[list[str]]] = {}
    for section, cells in rows(Settings, "", comments(Path(inspect.getsourcefile(Settings) or ""))):
        sections.setdefault(section.rstrip("."), []).append(cells)
    for section, lines in sections.items():
        page += ["", f"## {section}", *table("| setting | default | values | meaning |", lines)]
    return "\n".join(page) + "\n"


def environment_page() -> str:
    page = [ENVIRONMENT]
    text, lines = list[str](), list[list[str]]()
    for line in [*(ROOT / "env.sh").read_text().splitlines(), "# ── end ─"]:
        if title := re.match(r"# ── (.+?) ─", line):
            page += table("| variable | default | meaning |", lines) if lines else []
            page += ["", f"## {title[1]}"] if title[1] != "end" else []
            text, lines = [], []
        elif variable := re.match(r': "\$\{(\w+):=(.*)\}"$', line):
            name, value = (f"`{word}`" if word else "-" for word in variable.groups())
            if text:
                lines.append([name, value, " ".join(text).replace("|", "\\|")])
            else:  # shares the text of the one before it
                lines[-1][:2] = f"{lines[-1][0]}, {name}", f"{lines[-1][1]}, {value}"
            text = []
        elif line.startswith("#"):
            text.append(line.lstrip("# "))
    return "\n".join(page) + "\n"


PAGES = {"settings.md": settings_page, "environment.md": environment_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (ROOT / "docs" / name).write_text(make())
        print(f"docs/{name}")
