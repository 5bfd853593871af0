"""The documents: links lead somewhere, commands run, and files and settings named in them exist."""

import ast
import inspect
import os
import re
import shlex
import shutil
import socket
import subprocess
from functools import cache
from pathlib import Path

import pytest
from reference_pages import PAGES, comments, rows

from qwen35.config.load import load_settings
from qwen35.config.schema import Settings

ROOT = Path(__file__).parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("dev/*.md")])
each_page = pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BOTH = ("README.md", "docs/guide.md", "docs/from-mindspeed.md")  # in both languages
ELSEWHERE = re.compile(r"from-mindspeed")  # names the files and settings of another project
# These start tests or downloads, so only their variables are checked.
NOT_RUN = (
    "test",
    "test-npu",
    "test-versions",
    "test-browser",
    "test-trackers",
    "test-trl",
    "rehearse",
    "plan",
    "bench",
    "lint",
    "clean",
)


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(kind, text.replace("\\\n", " ")) for kind, text in BLOCK.findall(page.read_text())]


def code(page: Path) -> str:
    """All that stands in `…` or between ``` lines."""
    text = page.read_text()
    return "\n".join([m[0] for m in BLOCK.finditer(text)] + re.findall(r"`([^`]+)`", BLOCK.sub("", text)))


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks that this project answers, without their comments."""
    lines = [line for kind, text in blocks(page) if kind == "bash" for line in text.splitlines()]
    return [re.sub(r"  +#.*| # .*", "", line).strip() for line in lines if re.match(r"make|bash scripts/", line)]


EXAMPLES = re.findall(r"^#> (make .*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
COMMANDS = sorted({line for page in DOCS for line in commands(page)} | {*EXAMPLES})


def assignments(line: str) -> dict[str, str]:
    words = shlex.split(re.sub(r"<[^>]*>", "https://pypi.example/simple", line))
    return dict(word.split("=", 1) for word in words[1:] if re.match(r"[A-Z_]+=", word))


# -- generated pages -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_up_to_date(name):
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "make docs"


def test_every_setting_and_variable_says_what_it_means():
    said = [
        cells
        for page in PAGES
        for cells in re.findall(r"^\| `(.*?) \|(.*)\|$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    ]
    assert len(said) > 100
    assert not [name for name, cells in said if len(cells.split("|")[-1].split()) < 2]


def test_comments_above_and_beside_a_setting_are_found(tmp_path):
    lines = [
        "class A:",
        "    # above, one",
        "    # two",
        "    x: int = (",
        "        1  # inside",
        "    )",
        "    y: str = '# no'  # beside",
    ]
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert comments(tmp_path / "a.py") == {("A", "x"): "above, one two inside", ("A", "y"): "beside"}


# -- links, files, settings ------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_every_link_leads_somewhere(page):
    text = re.sub(r"`[^`]*`", "", BLOCK.sub("", page.read_text()))
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https://[\w.-]+/", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_files_that_a_page_names_exist(page):
    if ELSEWHERE.search(page.name):
        return
    folders = "accept|assets|bench|configs|deploy|docker|docs|kernels|qwen35|rehearse|scripts|tests"
    named = re.findall(rf"(?<![\w/<])(?:{folders})/[\w/.-]+\.(?:sh|py|yaml|txt|md)\b", code(page))
    missing = {name for name in named if not (ROOT / name).exists()} - {"scripts/X.sh"}
    anywhere = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert not missing
    assert not set(re.findall(r"(?<![\w/.<-])\w+\.py\b", code(page))) - anywhere
    for module in re.findall(r"python -m ([\w.]+)", code(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module


@each_page
def test_settings_that_a_page_names_exist(page):
    known = {f"{path}{cells[0].strip('`')}" for path, cells in rows(Settings, "", comments(source()))} | {
        "model.loss_type"
    }
    known |= {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    lines = page.read_text().splitlines()
    if ELSEWHERE.search(page.name):  # in a row of a table the last cell says what is here
        lines = [line.split(" | ")[-1] for line in lines]
    inline = re.findall(r"`([^`]+)`", BLOCK.sub("", "\n".join(lines))) + [text for _, text in blocks(page)]
    named = re.findall(r"(?<![\w/.-])(?:data|model|parallel|training)\.[a-z][\w.]*\w", "\n".join(inline))
    modules = ("model.language_model", "model.layers", "model.visual", "model.safetensors")  # of the model's own names
    assert not {n for n in named if not n.startswith((*modules, "model.kernels.")) and n not in known}


def source() -> Path:
    return Path(inspect.getsourcefile(Settings) or "")


# -- commands --------------------------------------------------------------------------------------

STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>calls
[[ $* != *--get* ]] || printf 'runs/tiny\\n300\\n'
if [[ $* == *--nnodes* && $CONFIG == configs/tiny.yaml ]]; then
    mkdir -p runs/tiny
    echo 300 >runs/tiny/latest_checkpointed_iteration.txt
fi
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project whose Python writes down what it is given."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "env.sh"):
        shutil.copy(ROOT / name, folder)
    (folder / "qwen35").symlink_to(ROOT / "qwen35")
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/.installed").write_text("cpu-x86-3.11.7\n")
    (folder / ".venv/bin/python").write_text(STAND_IN)
    (folder / ".venv/bin/python").chmod(0o755)
    return folder


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line[:70])
def test_commands_run_and_their_options_exist(line, project):
    """The real scripts run in a copy of the project; what they hand to Python is only checked."""
    if not line.startswith("make"):
        assert (ROOT / shlex.split(line)[1]).exists()
        return
    target = line.split()[1] if " " in line else "help"
    assert target in targets()
    given = assignments(line)
    assert given.keys() <= set(re.findall(r'^: "\$\{(\w+):=', (ROOT / "env.sh").read_text(), re.MULTILINE))
    recipe = ROOT / given.get("CONFIG", "configs/tiny.yaml")
    assert recipe.exists()
    if target in ("finetune", "rehearse", "preflight", "show", "doctor"):
        load_settings(recipe, [word for word in shlex.split(given.get("ARGS", "")) if not word.startswith("-")])
    if target in NOT_RUN:
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"MASTER_PORT": str(port), "CANN_PATH": str(project / "no_cann")}
    if target == "install":
        environment |= {"DRY_RUN": "1", "TORCH_INDEX": "https://pypi.example/simple"}
    (project / "calls").write_text("")
    words = ["make", target, *(f"{name}={value}" for name, value in given.items())]
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    calls = (project / "calls").read_text()
    assert calls or target in ("install", "help")
    assert set(re.findall(r"(?<=\s)--[a-z][\w-]*", calls)) <= options()


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+): +## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def options() -> set[str]:
    """All that the command lines of the project take, as their sources name them."""
    files = [path for folder in ("qwen35", "accept") for path in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text()) for path in files]
    words = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {word for word in words if isinstance(word, str) and word.startswith("--")} | {"--help"}


@each_page
def test_targets_in_sentences_exist(page):
    assert set(re.findall(r"(?<![\w-])make ([a-z][a-z-]*)", code(page))) <= targets()


MINDSPEED = """Qwen35Converter GenericDCPConverter load_format save_format ep_plan gdn_implementation chunkmbs train_epochs
    lr_scaling_plan lora""".split()


@pytest.mark.parametrize("name", ["from-mindspeed.md", "from-mindspeed.zh-CN.md"])
def test_each_word_of_mindspeed_has_its_place_or_the_reason_why_not(name):
    cells = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / name).read_text().splitlines()]
    for word in MINDSPEED:
        places = [row[1] for row in cells if len(row) == 2 and re.search(rf"\b{word}\b", row[0])]
        assert places, word
        assert all(re.search(r"`[^`]+`|not here, because|没有，因为", place) for place in places), word


# another word for what the glossary calls 预演, 打包序列, 门控 DeltaNet, 免密 SSH, 桩 and 出现 NaN
OTHER_WORDS = "演练|彩排|装箱|打包后的序列|门控增量|增量网络|无密码|免密码|不问密码|替身|假库|变成 NaN|成为 NaN"


@pytest.mark.parametrize("page", [p for p in DOCS if ".zh-CN." in p.name], ids=lambda p: p.name)
def test_chinese_pages_have_one_word_for_each_thing(page):
    assert not re.findall(OTHER_WORDS, page.read_text())


# -- form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_both_languages_have_the_same_parts(name):
    """The same headings, rows of tables, blocks and, but for their prose, commands."""
    english, chinese = ROOT / name, ROOT / name.replace(".md", ".zh-CN.md")
    for pattern in (r"^#+ ", r"^\|", r"^```"):
        found = [re.findall(pattern, page.read_text(), re.MULTILINE) for page in (english, chinese)]
        assert found[0] == found[1], pattern
    typed = [
        [re.sub(r" (?:PROMPT|TORCH_INDEX)=.*", "", line) for line in commands(page)] for page in (english, chinese)
    ]
    assert typed[0] == typed[1]


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_a_readme_is_short_and_first_says_what_never_ran_on_an_npu(name):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines[:20] if "docs/proof.md" in line], (
        "the first screen says what has never run on an NPU"
    )


@each_page
def test_sentences_are_wrapped(page):
    lines = BLOCK.sub("", page.read_text()).splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_tree_is_what_git_has(name):
    tree = next(text for kind, text in blocks(ROOT / name) if not kind and "Makefile" in text)
    said: dict[str, set[str]] = {}
    folder = ""
    for line in tree.splitlines():
        indent, names = re.match(r"( *)(.*?)(?:  |$)", line).groups()
        folder = folder if indent else ""
        said.setdefault(folder, set()).update(names.split(", "))
        if not indent and names.endswith("/"):
            folder = names
    for folder, named in said.items():
        assert named == entries(ROOT / folder), folder or "."


def entries(folder: Path) -> set[str]:
    """What git has of a folder, but for hidden files."""
    listed = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=True).stdout
    parts = [name.partition("/") for name in listed.split() if not name.startswith(".")]
    return {f"{name}{slash}" for name, slash, _ in parts}
