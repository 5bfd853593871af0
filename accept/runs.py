"""Whole runs of the tiny recipe, by the launcher: beside the CPU's, on several ranks beside one, killed and resumed."""

import os
import subprocess
import sys
import time
from functools import partial
from math import lcm

from torch import Tensor

from accept.task import AcceptError, Task, distance
from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.checkpoint.dcp_source import MODEL, OPTIMIZER, DCPSource
from qwen35.checkpoint.slices import TensorSlice
from qwen35.device import CPU_ONLY_ENV
from qwen35.launch.rendezvous import free_port
from qwen35.processes import die_with
from qwen35.tools.tiny import ASSETS, make_digits, make_model
from qwen35.training.metrics import read_metrics

STEPS, INTERVAL = 12, 4
SAME = ("loss", "aux_loss", "grad_norm")
TOLERANCES = {
    "fp32": (1e-3, "fp32: sums in another order, which AdamW makes larger from step to step"),
    "bf16": (5e-2, "bf16: tokens between two experts may take the other one"),
}
REPEATABLE = "training.deterministic=true"


class Runs:
    """Of the same bins in every step, however many ranks share them."""

    def __init__(self, task: Task):
        self.folder, self.bins = task.folder, lcm(2, task.ranks)
        make_model(self.folder / "model")
        make_digits(self.folder / "digits")

    def train(self, name: str, ranks: int, *overrides: str, kill: bool = False, on_cpu: bool = False) -> str:
        """Raises AcceptError with the run's own last line. kill: -9 of its launcher behind its first checkpoint."""
        basic = f"dataset: {self.folder}/digits/train.json, dataset_dir: {self.folder}/digits, cutoff_len: 768"
        own = {
            "data.dataset_param.basic_parameters": f"{{{basic}, max_samples: {64 * self.bins}}}",
            "model.model_name_or_path": f"{self.folder}/model",
            "training.init_from_hf_path": f"{self.folder}/model",
            "training.load": "null",
            "training.save": f"{self.folder}/{name}",
            "training.save_interval": INTERVAL,
            "training.train_iters": STEPS,
            "training.log_interval": 1,
            "training.adam_eps": 1e-4,  # else gradients that are nothing but rounding take whole steps
            "training.gradient_accumulation_steps": self.bins // ranks,
        }
        launcher = [sys.executable, "-m", "qwen35.launch", "--nproc_per_node", str(ranks)]
        launcher += ["--master_port", str(free_port(is_alone=True))]
        settings = [f"{key}={value}" for key, value in own.items()]
        process = subprocess.Popen(
            [*launcher, str(ASSETS.parent / "configs/tiny.yaml"), *settings, *overrides],
            env=os.environ | (CPU_ONLY_ENV if on_cpu else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # there is one thread here
        )
        while kill and process.poll() is None and newest_checkpoint(self.folder / name) is None:
            time.sleep(0.01)
        if kill:
            process.kill()
        _, err = process.communicate()
        if process.returncode != (-9 if kill else 0):
            raise AcceptError((err.strip().splitlines() or [f"a run on {ranks} ranks ended before it was killed"])[-1])
        return name

    def errors(self, ours: str, theirs: str, *parts: str) -> dict[str, float]:
        """Of what is on the curve, and of the largest tensor error in each part of the last checkpoint."""
        pairs = zip(*(read_metrics(self.folder / name / "metrics.jsonl") for name in (ours, theirs)), strict=True)
        curve = max(abs(a[k] - b[k]) / abs(b[k]) for a, b in pairs for k in SAME)
        return {"curve": curve, **{of[:-1]: distance(self.tensors(ours, of), self.tensors(theirs, of)) for of in parts}}

    def tensors(self, name: str, prefix: str) -> list[Tensor]:
        source = DCPSource(newest_checkpoint(self.folder / name) or name, prefix)
        return [source.read(one, TensorSlice.full(spec.shape)) for one, spec in sorted(source.specs.items())]


def check(task: Task) -> None:
    runs, ranks = Runs(task), task.ranks
    for dtype, tolerance in TOLERANCES.items() if not task.small else ():
        once = ("training.train_iters=1", f"training.dtype={dtype}")
        here, host = runs.train(f"step-{dtype}", 1, *once), runs.train(f"host-{dtype}", 1, *once, on_cpu=True)
        task.compare(f"one training step, {dtype}, beside the CPU", runs.errors(here, host, MODEL), *tolerance)
    alone = runs.train("alone", 1, *[REPEATABLE] * task.small)
    for count in sorted({2, ranks} if ranks > 1 else ()):
        several = runs.train(f"ranks-{count}", count)
        what = f"{STEPS} steps on {count} ranks beside one"
        task.compare(what, runs.errors(several, alone, MODEL), *TOLERANCES["fp32"])
    if ranks > 1 and not task.small:
        split = runs.train("experts", 2, "parallel.expert_parallel_size=2")
        task.compare("the same, experts on 2 ranks", runs.errors(split, alone, MODEL), *TOLERANCES["fp32"])
    whole, ranks = (alone, 1) if task.small else (runs.train("whole", ranks, REPEATABLE), ranks)
    runs.train("killed", ranks, REPEATABLE, kill=True)
    errors = runs.errors(runs.train("killed", ranks, REPEATABLE), whole, MODEL, OPTIMIZER)
    task.compare(f"killed behind a checkpoint and resumed, ranks: {ranks}", errors, 0.0, f"bit for bit, {REPEATABLE}")
