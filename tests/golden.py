"""Figures of what the project computes and offers, which a refactoring must not change.

`python tests/golden.py` rewrites tests/fixtures/golden.json after an intended change of
behaviour; the commit then shows the difference. tests/house/test_golden.py compares.

Weights and images are made from integers, independent of random generators and of the machine.
"""

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from hf_folder import write_hf
from peer import config_dict
from PIL import Image
from tokenizer_fixture import make_model_folder
from training_runs import ROOT, tensors, train

from qwen35.checkpoint.convert import dcp_to_hf, hf_to_dcp
from qwen35.checkpoint.hf_write import EXPORT_MANIFEST
from qwen35.config.schema import Settings
from qwen35.model import Qwen35
from qwen35.training.metrics import read_metrics

FILE = ROOT / "tests/fixtures/golden.json"
RUNS = {  # name -> mixture of experts, what the records show, processes, settings
    "dense": (False, "text", 1, ()),
    "experts, images, expert parallel": (True, "images", 2, ("parallel.expert_parallel_size=2",)),
    "dense, videos, resumed": (False, "videos", 2, ("training.save_interval=5",)),
}


def spread(count: int, seed: int) -> torch.Tensor:
    """[count] fp32 in [-1, 1), each of 16 bits, spread like noise."""
    x = (torch.arange(count, dtype=torch.int64) + seed * 7919) * 2654435761 % 2**32
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    return ((x ^ (x >> 13)) % 2**16 - 2**15).float() / 2**15


def weights(config: dict) -> dict[str, torch.Tensor]:
    state = Qwen35.from_config(config).state_dict()
    for seed, (name, x) in enumerate(sorted(state.items())):
        scale = 0.5 if "A_log" in name else 0.12 if x.ndim > 1 else 0.2
        x.copy_(spread(x.numel(), seed).view(x.shape) * scale + name.endswith("linear_attn.norm.weight"))
    return state


def model_folder(folder: Path, moe: bool) -> Path:
    made = make_model_folder(folder / "tokenizer")
    config = config_dict(moe) | {
        k: v for k, v in json.loads((made / "config.json").read_text()).items() if k[-3:] == "_id"
    }
    config["text_config"] |= {"vocab_size": 512}
    write_hf(weights(config), config, folder / "weights")
    for file in made.iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder / "weights")
    return folder / "weights"


def records(folder: Path, visuals: str) -> list[dict]:
    for i in range(8):
        pixels = (spread(3 * (40 + 8 * i) * 48, i) * 127 + 128).byte().numpy().tobytes()
        Image.frombytes("RGB", (40 + 8 * i, 48), pixels).save(folder / f"{i}.png")
    made = []
    for i in range(24):
        user = {"text": f"What is {i}?", "images": f"<image>What is {i}?", "videos": f"<video>What is {i}?"}[visuals]
        made.append(
            {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": f"It is {i % 7}."}]}
        )
        if visuals == "images":
            made[-1]["images"] = [f"{i % 8}.png"]
        elif visuals == "videos":
            made[-1]["videos"] = [[f"{i % 8}.png"] * (2 + i % 3)]
    return made


def run(folder: Path, moe: bool, visuals: str, processes: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """Ten steps; with a checkpoint after five, the last five are trained twice."""
    (folder / "records.json").write_text(json.dumps(records(folder, visuals)))
    basic = {"dataset": str(folder / "records.json"), "dataset_dir": str(folder), "cutoff_len": 160}
    recipe = {
        "data": {"dataset_param": {"basic_parameters": basic, "preprocess_parameters": {"image_max_pixels": 4096}}},
        "model": {
            "model_name_or_path": str(model_folder(folder, moe)),
            "loss_cfg": {"router_aux_loss_coef": 0.01 * moe},
        },
        "training": {"train_iters": 10, "save": "unset", "init_from_hf_path": str(folder / "weights"), "dtype": "fp32"}
        | {"lr": 1e-3, "weight_decay": 0.1, "adam_eps": 1e-4, "async_save": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    save, is_resumed = folder / "run", "training.save_interval=5" in settings
    for _ in range(2 if is_resumed else 1):
        done = train(folder, save, processes, *settings)
        assert done.returncode == 0, done.stderr
        if is_resumed and "steps 1 to 10" in done.stdout:
            shutil.rmtree(save / "iter_0000010")
    lines = read_metrics(save / "metrics.jsonl")
    keys = ("loss", "aux_loss", "grad_norm", "lr", "tokens", "label_tokens", "image_tokens")
    return {
        "metrics": {key: [line[key] for line in lines] for key in keys if key in lines[0]},
        "weights": {name: digest(x) for name, x in sorted(tensors(save).items())},
    }


def digest(x: torch.Tensor) -> list[float]:
    """Sum of magnitudes, and a weighted sum that depends on the order of the values."""
    x = x.double().flatten()
    return [float(f"{value:.9g}") for value in (x.abs().sum(), x @ spread(x.numel(), 1).double())]


def exported(folder: Path) -> dict[str, str]:
    """sha256 of each file of an export from a converted DCP checkpoint.

    Without what the manifest says of the checkpoint, whose bytes differ between releases of torch.
    """
    hf_to_dcp(model_folder(folder, moe=True), folder / "dcp", None)
    dcp_to_hf(folder / "dcp", folder / "weights", folder / "hf")
    manifest = folder / "hf" / EXPORT_MANIFEST
    content = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "checkpoint"}
    manifest.write_text(json.dumps(content, indent=2) + "\n")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((folder / "hf").iterdir())}


def settings_of(kind: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each setting's path and default."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        inner = next((x for x in (hints[f.name], *get_args(hints[f.name])) if is_dataclass(x)), None)
        if inner:
            yield from settings_of(inner, f"{path}{f.name}.")
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        yield f"{path}{f.name}", "required" if default is MISSING else "" if inner else repr(default)


def commands() -> dict[str, list[str]]:
    """Of each command line: its program's name and its options, as the sources name them."""
    found: dict[str, list[str]] = {}
    for path in sorted(
        p for folder in ("qwen35", "rehearse", "bench", "accept") for p in (ROOT / folder).rglob("*.py")
    ):
        tree = ast.walk(ast.parse(path.read_text()))
        words = [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        program = re.search(r"\(prog=\"([^\"]*)", path.read_text())
        if program:
            options = {word for word in words if re.fullmatch("--[a-z][a-z_-]*", word)}
            name = program[1].removeprefix("python -m ")
            found[name.rpartition(".")[2] if name.startswith("qwen35.") else name] = sorted(options)
    return found


def inventory() -> dict[str, Any]:
    variables = re.findall(r'^: "\$\{(\w+):=(.*)\}"$', (ROOT / "env.sh").read_text(), re.MULTILINE)
    return {
        "settings": dict(settings_of(Settings)),
        "commands": commands(),
        "variables": dict(variables),
        "targets": sorted(re.findall(r"^([a-z-]+): +## ", (ROOT / "Makefile").read_text(), re.MULTILINE)),
        "scripts": sorted(path.name for path in (ROOT / "scripts").glob("*.sh")),
    }


def main() -> None:
    made: dict[str, Any] = {"inventory": inventory(), "runs": {}}
    for name, parts in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            made["runs"][name] = run(Path(folder), *parts)
    with tempfile.TemporaryDirectory() as folder:
        made["exported"] = exported(Path(folder))
    FILE.write_text(json.dumps(made, indent=1) + "\n")
    print(
        subprocess.run(
            ["git", "diff", "--stat", str(FILE)], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout
    )


if __name__ == "__main__":
    sys.exit(main())
