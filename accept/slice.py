"""Some layers of Qwen3.5-4B with random weights: tokens/s, MFU and memory beside a rehearsal."""

import json
import os
import subprocess

import torch

import kernels
from accept.speed import matmul_rate, seconds
from accept.task import Task
from qwen35.config.load import load_settings
from qwen35.config.schema import Settings
from qwen35.device import init_process, is_apart, peak_memory
from qwen35.model import Qwen35, load_config
from qwen35.parallel.mesh import make_meshes
from qwen35.train import Run, distribute, train_step
from qwen35.training.optimizer import GradientNorm
from rehearse.batches import Mix, make_batch
from rehearse.configs import some_layers

RECIPE, SEQUENCE = "configs/qwen3_5_4B.yaml", 128
UNAVAILABLE = 3  # exit status of scripts/rehearse.sh where pip's index does not have what it needs
TOLERANCE = 0.15  # of the rehearsed peak, which does not count fragmentation


def check(task: Task) -> None:
    device = init_process()
    kinds, words, tokens = ["linear_attention"] * 3 + ["full_attention"], 248_320, 4096
    if not is_apart(device):
        kinds, words, tokens = kinds[2:], 8192, 128 if task.small else 512
    (task.folder / "config.json").write_text(json.dumps(some_layers(task.size, kinds, {"vocab_size": words})))
    basic, model = "data.dataset_param.basic_parameters", f"model.model_name_or_path={task.folder}"
    overrides = [model, f"{basic}.cutoff_len={tokens}", "training.micro_batch_size=1"]
    took, flops = train(load_settings(RECIPE, overrides), device)
    mfu = flops / took / matmul_rate(device, tokens)
    what, memory = f"{len(kinds)} layers of {task.size}, {words:,} words, {tokens:,} tokens", peak_memory(device)
    found = f"{took:.3f} s a step, {tokens / took:,.0f} tokens/s, MFU {mfu:.1%} of the matmuls' rate"
    rehearsed = {} if task.small else rehearse(task, overrides)
    if not rehearsed:
        task.add(what, "info", found)
        task.add("its peak memory", "info", f"{memory / 1e9:.2f} GB")
        return
    times = f"{rehearsed['best']:.3f} to {rehearsed['worst']:.3f} s a step, rehearsed"
    task.add_speed(device, what, found, rehearsed["worst"] / took, times)
    status = "held" if abs(memory / rehearsed["peak"] - 1) <= TOLERANCE else "off"
    wanted = f"{rehearsed['peak'] / 1e9:.2f} GB rehearsed, within {TOLERANCE:.0%}"
    task.add("its peak memory", status if is_apart(device) else "info", f"{memory / 1e9:.2f} GB", wanted)


def train(settings: Settings, device: torch.device) -> tuple[float, float]:
    """-> seconds of a step, its model FLOPs"""
    config = load_config(settings.model.model_name_or_path)
    meshes = make_meshes(device.type, settings.parallel)
    with torch.device("meta"):
        model = Qwen35(config, kernels=kernels.select(device.type))
    optimizer = distribute(settings, model, meshes, device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    gradients = GradientNorm(model, meshes.weights["shard"].get_group())
    run = Run(settings, device, meshes, model, optimizer, gradients, iter(()), 0, {})
    batch = make_batch(settings, config, Mix(SEQUENCE))
    flops: list[float] = []
    return seconds(lambda: flops.append(train_step(run, [batch], 1e-5, 0.0).flops), device), flops[0]


def rehearse(task: Task, overrides: list[str]) -> dict[str, float]:
    """The same step on one virtual NPU at assumed rates; {} after a row that says why it failed."""
    variables = {"CONFIG": RECIPE, "NODES": "1", "NPUS_PER_NODE": "1", "RATES": "none", "ARGS": ""}
    command = ["bash", "scripts/rehearse.sh", "--json", "--sequence", str(SEQUENCE), *overrides]
    done = subprocess.run(command, check=False, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    task.add("its rehearsal", "info" if done.returncode == UNAVAILABLE else "off", reason)
    return {}
