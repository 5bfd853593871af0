"""The catalogue of mistakes: a small project with one thing broken, and a command that meets it.

Each command runs in a forked process that has everything imported. Tests see its exit code, its
standard error, and what it leaves on the disk.
"""

import importlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml
from forked import MAINS, fork_ranks, start, take
from hf_folder import write_hf
from peer import ONE_OF_EACH, config_dict
from PIL import Image
from plain import plain
from ports import free_port
from tokenizer_fixture import make_model_folder

from qwen35.checkpoint.convert import hf_to_dcp
from qwen35.model import Qwen35

TRAIN = ("train", "r.yaml")
RESUME = ("train", "r.yaml", "training.init_from_hf_path=null", "training.load=dcp")
SHOW = ("data", "show", "r.yaml")
DATA = ("data", "convert", "--llava", "data/a.json", "--images", "data", "--out", "out/a.json")
CONVERT = ("convert", "hf_to_dcp", "--hf_dir", "hf", "--dcp_dir", "new")
EXPORT = ("convert", "dcp_to_hf", "--dcp_dir", "dcp", "--origin_hf_dir", "hf", "--save_hf_dir", "out")
EVALUATE = ("evaluate", "--model", "hf", "--data", "data/a.json", "--max_new_tokens", "1")
BASIC = "data.dataset_param.basic_parameters"

Break = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    name: str
    command: tuple[str, ...]
    words: tuple[str, ...]  # all of them in the line
    broken: Break = lambda place: None  # what is broken beforehand


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def check(place: Path, case: Case) -> None:
    """One line with the words, an exit code, and nothing that was not there."""
    case.broken(place)
    before = contents(place)
    done = run(place, *case.command)
    assert done.code in (1, 2), done
    assert done.err.endswith("\n") and done.err.count("\n") == 1, done.err
    assert [words for words in case.words if words not in done.err] == [], done.err
    assert contents(place) == before


def parametrized(cases: list[Case]) -> pytest.MarkDecorator:
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# -- the project -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def place(whole, tmp_path) -> Path:
    """A copy of the project to break."""
    return shutil.copytree(whole, tmp_path / "place")


def make_project(place: Path) -> Path:
    """hf/ in four shards, dcp/release, data/a.json with 12 records (8 with an image), r.yaml."""
    make_model_folder(place / "hf")
    small = {file.name: file.read_bytes() for file in (place / "hf").iterdir()}
    tokens = json.loads(small.pop("config.json"))
    config = config_dict(**ONE_OF_EACH) | {name: value for name, value in tokens.items() if name.endswith("_id")}
    config["text_config"] |= {"vocab_size": 512}
    shutil.rmtree(place / "hf")
    write_hf(Qwen35.from_config(config).state_dict(), config, place / "hf", shard_size=150_000)
    for name, content in small.items():
        (place / "hf" / name).write_bytes(content)
    hf_to_dcp(place / "hf", place / "dcp")
    (place / "data").mkdir()
    records = []
    for i in range(12):
        turns = [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"It is {i}."}]
        records.append({"id": f"r{i}", "conversations": turns})
        if i % 3:
            Image.new("L", (20 + i, 40), i * 4).save(place / f"data/{i}.png")
            records[i]["image"] = f"{i}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
    (place / "data/a.json").write_text(json.dumps(records))
    recipe = {
        "data": {
            "dataset_param": {
                "basic_parameters": {"dataset": "data/a.json", "dataset_dir": "data", "cutoff_len": 160},
                "preprocess_parameters": {"image_max_pixels": 4096},
            },
            "dataloader_param": {"patch_bucket": 16, "num_workers": 0},
        },
        "model": {"model_name_or_path": "hf"},
        "training": {"train_iters": 1, "save": "run", "init_from_hf_path": "hf", "dtype": "fp32", "lr": 1e-3},
    }
    (place / "r.yaml").write_text(yaml.safe_dump(recipe))
    return place


def contents(place: Path) -> dict[str, int]:
    """Every file with its size, every folder with -1."""
    return {
        str(path.relative_to(place)): path.lstat().st_size if path.is_file() else -1
        for path in sorted(place.rglob("*"))
        if not path.is_symlink()
    }


# -- ways to break it ------------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda place: (place / name).write_bytes(data)


def remove(name: str) -> Break:
    return lambda place: (place / name).unlink()


def cut(name: str, size: int) -> Break:
    """A file's first bytes; a negative size counts from its end."""
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:size])


def becomes_folder(name: str) -> Break:
    return lambda place: ((place / name).unlink(), (place / name).mkdir())


def change(name: str, where: str, value: object) -> Break:
    """A dotted entry of a JSON file; `...` takes it out."""

    def broken(place: Path) -> None:
        content = json.loads((place / name).read_text())
        *above, last = where.split(".")
        entry = content
        for key in above:
            entry = entry[int(key) if isinstance(entry, list) else key]
        if value is ...:
            del entry[last]
        else:
            entry[int(last) if isinstance(entry, list) else last] = value
        (place / name).write_text(json.dumps(content))

    return broken


def recipe(edit: Callable[[str], str]) -> Break:
    return lambda place: (place / "r.yaml").write_text(edit((place / "r.yaml").read_text()))


def record(**fields: object) -> Break:
    """Fields of the second record; None takes one out."""

    def broken(place: Path) -> None:
        records = json.loads((place / "data/a.json").read_text())
        records[1] |= fields
        records[1] = {name: value for name, value in records[1].items() if value is not None}
        (place / "data/a.json").write_text(json.dumps(records))

    return broken


def turns(*said: tuple[str, object]) -> Break:
    """What is said in the second record, as (from, value)."""
    return record(conversations=[{"from": who, "value": value} for who, value in said])


def both(*breaks: Break) -> Break:
    return lambda place: [broken(place) for broken in breaks]


def in_half(name: str) -> Break:
    """An image whose header is right and whose pixels are cut off."""

    def broken(place: Path) -> None:
        Image.effect_noise((64, 64), 90).save(place / name)
        cut(name, (place / name).stat().st_size // 2)(place)

    return broken


# -- processes -------------------------------------------------------------------------------------


def launch(processes: int) -> tuple[str, ...]:
    return ("launch", "--nproc_per_node", str(processes), "--master_port", str(free_port()), "r.yaml")


def run(place: Path, *command: str, file_size: int | None = None, environment: dict[str, str] | None = None) -> Done:
    """Run a command in `place`. file_size: largest file in bytes, which stands for a full disk."""
    return finish(*begin(place, *command, file_size=file_size, environment=environment))


def begin(
    place: Path, *command: str, file_size: int | None = None, environment: dict[str, str] | None = None
) -> tuple[BaseProcess, list[int]]:
    """The process and the pipes of its output, for `finish`."""
    return start(_command, place, command, file_size, environment or {})


def finish(process: BaseProcess, outputs: list[int]) -> Done:
    out, err = (_read(fd) for fd in outputs)
    process.join(300)
    assert process.exitcode is not None
    return Done(process.exitcode, plain(out), plain(err))


def _read(fd: int) -> str:
    with open(fd, "rb") as pipe:
        return pipe.read().decode()


def _command(
    outputs: list, place: Path, command: tuple[str, ...], file_size: int | None, environment: dict[str, str]
) -> None:
    take(outputs)
    os.environ |= environment
    os.chdir(place)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = list(command)
    fork_ranks()
    try:
        code = importlib.import_module(MAINS[command[0]]).main()
    except SystemExit as error:  # of argparse
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch down takes longer than most of the commands
