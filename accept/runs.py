"""Several ranks: collectives, and runs of the tiny recipe, which are also killed and resumed."""

import os
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from math import lcm

import torch.distributed as dist
from torch import Tensor

from accept.machine import RECIPE
from accept.task import Task, distance
from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.checkpoint.dcp_source import MODEL, OPTIMIZER, DCPSource
from qwen35.checkpoint.slices import TensorSlice
from qwen35.device import CPU_ONLY_ENV, init_process
from qwen35.launch.launcher import run as launch
from qwen35.preflight import collectives, measure
from qwen35.processes import die_with
from qwen35.rank import FAILURE_FILE, leave, run_rank
from qwen35.tools.tiny import make_digits, make_model
from qwen35.training.metrics import read_metrics

MIB = 1 << 20
OF_FSDP = ("all-gather", "reduce-scatter")
STEPS, FEW_STEPS = 12, 8
CURVES = ("loss", "aux_loss", "grad_norm")
TOLERANCES = {
    "fp32": (1e-3, "fp32: sums in another order, a difference that AdamW increases step by step"),
    "bf16": (5e-2, "bf16: tokens between two experts may go to the other one"),
}
REPEATABLE = "training.deterministic=true"


def check_ranks(task: Task) -> None:
    """Starts the ranks, each of which calls this again. The launcher prints why a rank failed."""
    if FAILURE_FILE in os.environ:
        leave(run_rank(lambda settings: measure_all(task), "accept", None, [RECIPE]))
    if task.ranks == 1:
        task.add("collectives", "info", "there is one device")
        return
    node = Namespace(nnodes=1, node_rank=0, nproc_per_node=task.ranks, master_addr="localhost", master_port=None)
    if launch([sys.executable, *sys.orig_argv[1:]], node):
        sys.exit(1)


def measure_all(task: Task) -> None:
    device = init_process(120)
    measure(device, lambda line: task.add("preflight", "info", line))
    sizes = [MIB] if task.small else [n * MIB for n in ((1, 16, 64, 256) if task.is_apart else (1, 16))]
    for name, size, seconds, rate in collectives(device, sizes):
        what, found = f"{name}, {size // MIB} MiB", f"{seconds * 1e3:.2f} ms, per rank "
        if dist.get_rank() == 0 and size == sizes[-1]:
            task.add_rate(what, "within", rate, found, is_rate=name in OF_FSDP)
        elif dist.get_rank() == 0:
            task.add(what, "info", f"{found}{rate / 1e9:.3g} GB/s")


def steps_of(task: Task) -> int:
    return FEW_STEPS if task.small else STEPS


def train(task: Task, name: str, ranks: int, *overrides: str, kill: bool = False, on_cpu: bool = False) -> str:
    """Every step has the same packed sequences, on any number of ranks.

    kill: -9 after the first checkpoint. A failed run ends this process, with its own last line.
    """
    folder, sequences = task.folder, lcm(2, task.ranks)
    data = f"dataset: {folder}/digits/train.json, dataset_dir: {folder}/digits, max_samples: {64 * sequences}"
    settings = (
        f"data.dataset_param.basic_parameters={{{data}, cutoff_len: {192 if task.small else 768}}}",
        *(f"{key}={folder}/model" for key in ("model.model_name_or_path", "training.init_from_hf_path")),
        *(f"training.save={folder}/{name}", "training.load=null", "training.save_interval=4"),
        *(f"training.train_iters={steps_of(task)}", f"training.gradient_accumulation_steps={sequences // ranks}"),
        *("training.log_interval=1", "training.adam_eps=1e-4"),  # else gradients of rounding errors make whole steps
    )
    launcher = [sys.executable, "-m", "qwen35.launch", "--nnodes", "1", "--nproc_per_node", str(ranks)]
    process = subprocess.Popen(
        [*launcher, RECIPE, *settings, *overrides],
        env=os.environ | (CPU_ONLY_ENV if on_cpu else {}),
        stdout=subprocess.DEVNULL,
        preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # there is one thread here
    )
    while kill and process.poll() is None and newest_checkpoint(folder / name) is None:
        time.sleep(0.01)
    if kill:
        process.kill()
    if process.wait() != (-9 if kill else 0):
        sys.exit(1 if process.returncode else f"a run on {ranks} ranks ended before it was killed")
    return name


def compare(task: Task, what: str, ours: str, exact: str, most: float, why: str, *parts: str) -> None:
    """By the largest relative error of the curves, and of each part of the last checkpoint."""

    def tensors(name: str, part: str) -> list[Tensor]:
        source = DCPSource(newest_checkpoint(task.folder / name) or name, part)
        return [source.read(key, TensorSlice.full(spec.shape)) for key, spec in sorted(source.specs.items())]

    lines = zip(*(read_metrics(task.folder / name / "metrics.jsonl") for name in (ours, exact)), strict=True)
    curve = max(abs(a[key] - b[key]) / abs(b[key]) for a, b in lines for key in CURVES)
    errors = {part[:-1]: distance(tensors(ours, part), tensors(exact, part)) for part in parts or [MODEL]}
    task.compare(what, {"curve": curve} | errors, most, why)


def check_runs(task: Task) -> None:
    make_model(task.folder / "model")
    make_digits(task.folder / "digits")
    run, held, ranks = partial(train, task), partial(compare, task), task.ranks
    for dtype, tolerance in TOLERANCES.items() if not task.small else ():
        once = ("training.train_iters=1", f"training.dtype={dtype}")
        runs = run(f"step-{dtype}", 1, *once), run(f"host-{dtype}", 1, *once, on_cpu=True)
        held(f"one training step, {dtype}, beside the CPU", *runs, *tolerance)
    alone = run("alone", 1, *[REPEATABLE] * task.small)
    for count in sorted({2, ranks} if ranks > 1 else ()):
        what = f"{steps_of(task)} steps on {count} ranks beside one"
        held(what, run(f"ranks-{count}", count), alone, *TOLERANCES["fp32"])
    if ranks > 1 and not task.small:
        several = run("experts", 2, "parallel.expert_parallel_size=2")
        held("the same, experts on 2 ranks", several, alone, *TOLERANCES["fp32"])
    whole, ranks = (alone, 1) if task.small else (run("whole", ranks, REPEATABLE), ranks)
    run("killed", ranks, REPEATABLE, kill=True)
    runs, why = (run("killed", ranks, REPEATABLE), whole), f"bit for bit, {REPEATABLE}"
    held(f"killed after a checkpoint and resumed, ranks: {ranks}", *runs, 0.0, why, MODEL, OPTIMIZER)
