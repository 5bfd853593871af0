"""Some layers of Qwen3.5-4B with random weights, trained as a run does: tokens/s, MFU and memory beside their rehearsal."""

import json
import os
import subprocess

import torch

import kernels
from accept.layers import NARROW, NARROW_TOWER
from accept.speed import matmul_rate, seconds
from accept.task import Task
from qwen35.config.load import load_settings
from qwen35.config.schema import Settings
from qwen35.device import has_own_memory, init_process, peak_memory
from qwen35.model import Qwen35, load_config
from qwen35.parallel.mesh import make_meshes
from qwen35.train import Run, distribute, train_step
from qwen35.training.optimizer import GradientNorm
from rehearse.batches import Mix, make_batch
from rehearse.configs import some_layers

RECIPE, SEQUENCE = "configs/qwen3_5_4B.yaml", 128
LACKING = 3  # exit status of scripts/rehearse.sh: what it stands on cannot be had
NEAR = 0.15  # of the rehearsed peak, in which fragmentation is not counted


def check(task: Task) -> None:
    device = init_process()
    kinds, words, tokens = ["linear_attention"] * 3 + ["full_attention"], 248_320, 4096
    if not has_own_memory(device):
        kinds, words, tokens = kinds[2:], 8192, 128 if task.small else 512
    text, tower = (NARROW, NARROW_TOWER) if task.small else ({}, {})
    config = some_layers("4B", kinds, text | {"vocab_size": words}, tower)
    (task.folder / "config.json").write_text(json.dumps(config))
    basic, model = "data.dataset_param.basic_parameters", f"model.model_name_or_path={task.folder}"
    overrides = [model, f"{basic}.cutoff_len={tokens}", "training.micro_batch_size=1"]
    took, flops = train(load_settings(RECIPE, overrides), device)
    share = flops / took / matmul_rate(device, tokens)
    what, memory = f"{len(kinds)} layers of 4B, {words:,} words, {tokens:,} tokens", peak_memory(device)
    found = f"{took:.3f} s a step, {tokens / took:,.0f} tokens/s, MFU {share:.1%} of the matmuls' rate"
    foreseen = {} if task.small else rehearse(task, overrides)
    if not foreseen:
        task.add(what, "told", found)
        return task.add("its peak memory", "told", f"{memory / 1e9:.2f} GB")
    ends = f"{foreseen['quick']:.3f} to {foreseen['slow']:.3f} s a step, rehearsed"
    task.measure(device, what, found, foreseen["slow"] / took, ends)
    near = "held" if abs(memory / foreseen["peak"] - 1) <= NEAR else "off"
    wanted = f"{foreseen['peak'] / 1e9:.2f} GB rehearsed, {NEAR:.0%} about it"
    return task.add("its peak memory", near if has_own_memory(device) else "told", f"{memory / 1e9:.2f} GB", wanted)


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
    """The same step on one virtual NPU, at rates that are stated; nothing, and a row that says why, where it cannot be had."""
    variables = {"CONFIG": RECIPE, "NODES": "1", "NPUS_PER_NODE": "1", "RATES": "none", "ARGS": ""}
    command = ["bash", "scripts/rehearse.sh", "--json", "--sequence", str(SEQUENCE), *overrides]
    done = subprocess.run(command, check=False, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    task.add("its rehearsal", "told" if done.returncode == LACKING else "off", reason)
    return {}
