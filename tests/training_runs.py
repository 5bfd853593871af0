"""Whole runs with real processes: a small model, a few images, a recipe, the training command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from checkpoint_cases import source_of
from forked import ROOT, Forked, launched
from hf_folder import write_hf
from peer import ONE_OF_EACH, config_dict
from PIL import Image
from plain import plain
from ports import free_port
from tokenizer_fixture import make_model_folder

from qwen35.checkpoint.convert import dcp_to_hf
from qwen35.checkpoint.dcp_folder import newest_checkpoint, resolve_load
from qwen35.checkpoint.dcp_source import MODEL, OPTIMIZER, DCPSource
from qwen35.checkpoint.slices import TensorSlice
from qwen35.model import Qwen35
from qwen35.training.metrics import read_metrics

STEPS, INTERVAL = 12, 4
WORKER = "data.dataloader_param.num_workers=1"  # as users have it; most runs here do without, and start sooner
SAVES = (f"training.save_interval={INTERVAL}", "training.log_interval=2", WORKER)
RECIPE = (f"training.train_iters={STEPS}", *SAVES)
SAME = ("step", "loss", "aux_loss", "grad_norm", "lr", "tokens", "label_tokens", "image_tokens")  # of a line of metrics


def make_workplace(folder: Path) -> Path:
    """A model folder, 60 records (two of three with an image), and a recipe for them."""
    model_folder = make_model_folder(folder / "model")
    tokens = json.loads((model_folder / "config.json").read_text())
    config = config_dict(**ONE_OF_EACH) | {k: v for k, v in tokens.items() if k.endswith("_id")}
    config["text_config"] = config["text_config"] | {"vocab_size": 512}
    write_hf(Qwen35.from_config(config).state_dict(), config, folder / "weights")
    for file in model_folder.iterdir():
        if file.name != "config.json":
            (folder / "weights" / file.name).write_bytes(file.read_bytes())
    records = []
    for i in range(60):
        record = {
            "id": i,
            "conversations": [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"It is {i % 7}."}],
        }
        if i % 3:
            Image.new("L", (20 + i, 40), i * 4).save(folder / f"{i}.png")
            record["image"] = f"{i}.png"
            record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
        records.append(record)
    (folder / "records.json").write_text(json.dumps(records))
    recipe = {
        "data": {
            "dataset_param": {
                "basic_parameters": {
                    "dataset": str(folder / "records.json"),
                    "dataset_dir": str(folder),
                    "cutoff_len": 160,
                },
                "preprocess_parameters": {"image_max_pixels": 4096},
            },
            "dataloader_param": {"patch_bucket": 16, "num_workers": 0},
        },
        "model": {"model_name_or_path": str(folder / "weights"), "loss_cfg": {"router_aux_loss_coef": 0.01}},
        "training": {
            "train_iters": 10,
            "save": str(folder / "unset"),
            "init_from_hf_path": str(folder / "weights"),
            "lr": 1e-2,
            "weight_decay": 0.1,
            "adam_eps": 1e-4,
            "dtype": "fp32",
            "log_interval": 4,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def train_command(workplace: Path, save: Path, processes: int, *overrides: str) -> list[str]:
    launcher = ["-m", "qwen35.launch", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    return [sys.executable, *launcher, str(workplace / "recipe.yaml"), f"training.save={save}", *overrides]


def start_as_ever(workplace: Path, save: Path, processes: int, *overrides: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        train_command(workplace, save, processes, *overrides),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_training(workplace: Path, save: Path, processes: int, *overrides: str, **env: str) -> Forked:
    return Forked(launched, train_command(workplace, save, processes, *overrides), env)


def with_plots(workplace: Path, save: Path, processes: int, *overrides: str) -> Forked:
    return start_training(workplace, save, processes, *overrides, PLOTS="1")


def train(
    workplace: Path, save: Path, processes: int, *overrides: str, how: Callable = start_training
) -> subprocess.CompletedProcess:
    process = how(workplace, save, processes, *overrides)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, plain(out), plain(err))


def tensors(save: Path, prefix: str = MODEL) -> dict[str, torch.Tensor]:
    """A save folder's newest weights, or with prefix "optimizer." its optimizer state."""
    source = DCPSource(resolve_load(save), prefix)
    return {name: source.read(name, TensorSlice.full(spec.shape)) for name, spec in source.specs.items()}


def assert_export_is_the_run(save: Path, weights: Path, folder: Path) -> None:
    """Exports the newest checkpoint into `folder`; weights: what the run began with."""
    dcp_to_hf(newest_checkpoint(save), weights, folder)
    exported, wanted = source_of(folder), tensors(save)
    assert exported.specs.keys() == wanted.keys()
    for name, spec in exported.specs.items():
        assert torch.equal(exported.read(name, TensorSlice.full(spec.shape)), wanted[name].to(spec.dtype)), name


def assert_same_run(save: Path, reference: Path) -> None:
    """The curve, the weights and the optimizer's state, bit for bit."""
    lines, wanted = (read_metrics(folder / "metrics.jsonl") for folder in (save, reference))
    assert [[line[k] for k in SAME] for line in lines] == [[line[k] for k in SAME] for line in wanted]
    for prefix in (MODEL, OPTIMIZER):
        a, b = tensors(save, prefix), tensors(reference, prefix)
        assert a.keys() == b.keys() and len(a) > 20
        assert all(torch.equal(a[name], b[name]) for name in a)
