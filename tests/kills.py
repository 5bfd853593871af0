"""kill -9 at random moments of real trainings, again and again, until the same command completes.

The result equals that of a run without kills, bit for bit; messages are complete and in order; no
process survives. `python tests/kills.py 300` tries 300 kills at new moments each time, and counts
them. Two of three trainings are forked (forked.py), the third is started as a user would.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.util import get_temp_dir
from pathlib import Path

import psutil
import torch
from training_runs import (
    INTERVAL,
    SAVES,
    assert_same_run,
    make_workplace,
    start_as_ever,
    start_training,
    tensors,
    train,
)

from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.training.metrics import read_metrics

STEPS = 16  # a checkpoint is removed before the last one is written, and its run goes on from another
RECIPE = (f"training.train_iters={STEPS}", *SAVES)
SAVE_LIMIT = 2  # checkpoints, so that older ones are removed all the time
TIMEOUT = 300  # seconds for a process that must end by itself
WHOLE_JOB = ("the launcher", "all of it")  # kills that end all processes of the job
VICTIMS = ("a rank", "a rank", "a worker", *WHOLE_JOB)


def folders(save: Path) -> set[str]:
    return {path.name for path in save.glob("iter_*")}


# what to wait for after a start, and the most seconds from then to the kill
AIMS = {
    "the start": (lambda save, before: True, None),  # as long as a start takes
    "a step": (lambda save, before: len(lines(save)) > before, 0.5),
    "a save": (lambda save, before: any(name.endswith(".tmp") for name in folders(save)), 0.2),
    "a removal": (lambda save, before: any(name.endswith(".gone") for name in folders(save)), 0.02),
    "the end": (lambda save, before: f"iter_{STEPS:07}.tmp" in folders(save), 0.3),
}


def lines(save: Path) -> list[dict]:
    return read_metrics(save / "metrics.jsonl")


@dataclass
class Series:
    """Kills of trainings. references: number of ranks -> the save folder of a run without kills."""

    workplace: Path
    references: dict[int, Path]
    seed: int
    start: float = 1.0  # seconds that a start takes here and now
    kills: int = 0
    done: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.random = random.Random(self.seed)

    def training(self, ranks: int, aims: list[str], save: Path) -> None:
        """One training, killed at each of these moments that it reaches; then it may complete."""
        is_done = False
        while aims and not is_done:
            is_done = self.job(ranks, aims, save)
        if not is_done:
            done = train(self.workplace, save, ranks, *RECIPE, f"training.save_total_limit={SAVE_LIMIT}")
            assert (done.returncode, done.stderr) == (0, "")
        assert_same_run(save, self.references[ranks])
        assert {path.name for path in save.iterdir()} - {".lock"} == {
            "config.yaml", "latest_checkpointed_iteration.txt", "loss.png", "metrics.jsonl", "report.html", "run.json",
            "train.log",
            *(f"iter_{step:07}" for step in (STEPS - INTERVAL, STEPS)),
        }  # fmt: skip
        self.done["trainings"] += 1

    def job(self, ranks: int, aims: list[str], save: Path) -> bool:
        """Start it and kill something at the next moments. Returns whether it completed."""
        restarts = self.random.randrange(min(2, len(aims)))
        recipe = (*RECIPE, f"training.save_total_limit={SAVE_LIMIT}", f"training.max_restarts={restarts}")
        how = start_training if self.random.randrange(3) else start_as_ever
        process = how(self.workplace, save, ranks, *recipe)
        hits: list[tuple[str, str]] = []
        for _ in range(restarts + 1):
            if not hits or hits[-1][1] not in WHOLE_JOB:
                hits += filter(None, [self.kill(process, aims.pop(0), save, ranks)])
        out, err = process.communicate(timeout=TIMEOUT)  # until no process is left that could print
        if hits and hits[-1][1] in WHOLE_JOB and process.returncode != -9:
            hits.pop()  # it had already ended
        self.kills += len(hits)
        self.done.update(word for hit in hits for word in hit)
        self.done["of those started as by a user"] += len(hits) * isinstance(process, subprocess.Popen)
        about = f"{hits}\n{process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err or any(victim == "a worker" for _, victim in hits), about
        if process.returncode == -9:
            assert hits and hits[-1][1] in WHOLE_JOB, about
            assert "error" not in err.rpartition("newest checkpoint\n")[2], about
        elif process.returncode:  # both of two hits may be in one start
            assert process.returncode == 1 and len(hits) > restarts, about
            assert "\nerror: " in f"\n{err}" and err.count("restart 1 of 1") == restarts, about
        else:  # the killed process was no longer needed, or a restart made up for it
            assert err.count("restart 1 of 1") == err.count("error: ") <= min(len(hits), restarts), about
        newest = newest_checkpoint(save)
        if newest:
            for prefix in ("model.", "optimizer."):
                a, b = tensors(newest, prefix), tensors(self.references[ranks] / newest.name, prefix)
                assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), about
        return process.returncode == 0

    def kill(self, process: subprocess.Popen, aim: str, save: Path, ranks: int) -> tuple[str, str] | None:
        """Returns the aim and what was killed; None if the job ended first."""
        victim, (is_due, max_delay) = self.random.choice(VICTIMS), AIMS[aim]
        before, begun = len(lines(save)), time.monotonic()
        while not is_due(save, before):
            assert time.monotonic() - begun < TIMEOUT, f"waited for {aim} in vain"
            if process.poll() is not None:
                return None
            time.sleep(0.002)
        if aim == "a step":
            self.start = time.monotonic() - begun
        time.sleep(self.random.uniform(0, self.start if max_delay is None else max_delay))
        if process.poll() is not None:
            return None
        try:
            rank_processes = psutil.Process(process.pid).children()
            workers = [child for rank in rank_processes for child in rank.children()]
            if victim == "a worker" and workers:
                self.random.choice(workers).kill()
            elif victim in ("a rank", "a worker") and len(rank_processes) == ranks:
                victim = "a rank"
                self.random.choice(rank_processes).kill()
            elif victim == "all of it":
                for each in [psutil.Process(process.pid), *rank_processes, *workers]:
                    each.kill()
            else:
                victim = "the launcher"
                process.kill()
        except psutil.NoSuchProcess:  # it has already ended
            if victim != "all of it":
                return None
        return aim, victim


def main(count: int, seed: int) -> int:
    failures = 0
    get_temp_dir()  # now: the folder below is gone when Python removes this one at its exit
    with tempfile.TemporaryDirectory(prefix="k", ignore_cleanup_errors=True) as root:
        os.environ["TMPDIR"] = tempfile.tempdir = root  # for what a killed launcher leaves
        workplace = make_workplace(Path(root, "w"))
        references = {ranks: Path(root, f"reference{ranks}") for ranks in (1, 2)}
        for ranks, save in references.items():
            assert train(workplace, save, ranks, *RECIPE).returncode == 0
        series = Series(workplace, references, seed)
        print(f"seed {seed}", flush=True)
        while series.kills < count:
            save = Path(root, f"run{series.done['trainings']}-{failures}")
            aims = series.random.choices(list(AIMS), k=min(12, count - series.kills))
            try:
                series.training(series.random.choice([1, 2]), aims, save)
            except (AssertionError, subprocess.TimeoutExpired):
                failures += 1
                print(f"FAILED: {save}\n{traceback.format_exc()}", flush=True)
            print(f"{series.kills} kills, {failures} failures: {dict(series.done)}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)))
