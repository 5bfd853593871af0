"""The device's speed beside assumed rates, and some layers of Qwen3.5-4B beside their rehearsal."""

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial

import torch

import kernels
from accept.cases import Case, make_cases, outputs_of, prepare, sizes_of_4b
from accept.task import Task
from bench.rows import alternate
from qwen35.config.load import load_settings
from qwen35.config.schema import Settings
from qwen35.device import init_process, peak_memory, set_up_device, synchronize
from qwen35.model import Qwen35, load_config
from qwen35.parallel.mesh import make_meshes
from qwen35.train import Run, distribute, train_step
from qwen35.training.optimizer import GradientNorm
from rehearse.batches import Mix, make_batch
from rehearse.configs import some_layers

OPERATORS = 1000
# bound by memory: a fused one reads its inputs and writes its outputs once
ELEMENTWISE = ("causal_conv1d", "rms_norm", "rms_norm_gated", "apply_rotary", "swiglu")
RECIPE, SEQUENCE = "configs/qwen3_5_4B.yaml", 128
UNAVAILABLE = 3  # exit status of scripts/rehearse.sh where pip's index does not have what it needs
TOLERANCE = 0.15  # of the rehearsed peak, which does not count fragmentation


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of several synchronized calls, after a first one that compiles and allocates."""

    def synchronized() -> None:
        call()
        synchronize([device])

    return alternate([synchronized])[0]


def matmul_rate(device: torch.device, tokens: int) -> float:
    """FLOP/s of the largest linear layer of 4B, forward and backward in bf16."""
    x, w, y = (torch.ones(shape, device=device).bfloat16() for shape in ((tokens, 2560), (9216, 2560), (tokens, 9216)))
    return 6 * tokens * w.numel() / seconds(lambda: (x @ w.T, y @ w, y.T @ x), device)


def check_speed(task: Task) -> None:
    device = set_up_device()
    torch.manual_seed(0)
    tokens, words = (4096, 248_320) if task.is_apart else (64 if task.small else 256, 16_384)
    task.add_rate("bf16 matmuls of 4B, forward and backward", "flops", matmul_rate(device, tokens))
    x, y, out = (torch.ones(tokens << 15, device=device, dtype=torch.bfloat16) for _ in range(3))
    rate = 3 * x.nbytes / seconds(partial(torch.add, x, y, out=out), device)
    task.add_rate(f"adding {x.nbytes >> 20} MiB", "memory", rate)
    both = seconds(lambda: [x[:1].add_(1) for _ in range(OPERATORS)], device) / OPERATORS  # a view and an addition
    task.add_rate("launching an operator", "host", both / 2)
    chosen, cases = kernels.select(device.type), make_cases(*sizes_of_4b(tokens, words))
    for op in ELEMENTWISE if task.small else cases:
        alone, both, moved = time_op(cases[op](), getattr(chosen, op), device)
        what, found = f"{op}, {tokens:,} tokens of 4B", f"{alone * 1e3:.2f} ms, with backward {both * 1e3:.2f} ms, "
        if op in ELEMENTWISE:
            task.add_rate(what, "memory", moved / alone, found, is_rate=False)
        else:
            task.add(what, "info", f"{found}{moved / 1e9:.2g} GB in and out")


def time_op(case: Case, op: Callable, device: torch.device) -> tuple[float, float, int]:
    """-> seconds of forward, of forward and backward, bytes of inputs and outputs"""
    args, inputs = prepare(case, torch.bfloat16, device)
    directions = [torch.ones_like(y) for y in outputs_of(op, args)]
    both = seconds(lambda: torch.autograd.grad(outputs_of(op, args), inputs, directions), device)
    with torch.no_grad():
        alone = seconds(partial(op, *args), device)
    return alone, both, sum(x.nbytes for x in (*inputs, *directions))


def check_slice(task: Task) -> None:
    """Random weights, trained as a run does: tokens/s, MFU and peak memory."""
    device = init_process()
    kinds, words, tokens = ["linear_attention"] * 3 + ["full_attention"], 248_320, 4096
    if not task.is_apart:
        kinds, words, tokens = kinds[2:], 8192, 128 if task.small else 512
    sizes = {"vocab_size": words} | ({"intermediate_size": 512} if task.small else {})
    (task.folder / "config.json").write_text(json.dumps(some_layers(task.size, kinds, sizes)))
    basic, model = "data.dataset_param.basic_parameters", f"model.model_name_or_path={task.folder}"
    overrides = [model, f"{basic}.cutoff_len={tokens}", "training.micro_batch_size=1"]
    took, flops = train(load_settings(RECIPE, overrides), device)
    mfu = flops / took / matmul_rate(device, tokens)
    what, memory = f"{len(kinds)} layers of {task.size}, {words:,} words, {tokens:,} tokens", peak_memory(device)
    found = f"{took:.3f} s a step, {tokens / took:,.0f} tokens/s, MFU {mfu:.1%} of the matmuls' rate"
    peak = "its peak memory", f"{memory / 1e9:.2f} GB"
    rehearsed = {} if task.small else rehearse(task, overrides)
    if not rehearsed:
        task.add(what, "info", found)
        task.add(peak[0], "info", peak[1])
        return
    times = f"{rehearsed['best']:.3f} to {rehearsed['worst']:.3f} s a step, rehearsed"
    task.add_speed(what, found, rehearsed["worst"] / took, times)
    status = "held" if abs(memory / rehearsed["peak"] - 1) <= TOLERANCE else "off"
    wanted = f"{rehearsed['peak'] / 1e9:.2f} GB rehearsed, within {TOLERANCE:.0%}"
    task.add(peak[0], status if task.is_apart else "info", peak[1], wanted)


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
    step = partial(train_step, run, [make_batch(settings, config, Mix(SEQUENCE))], 1e-5, 0.0)
    return seconds(step, device), step().flops


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
