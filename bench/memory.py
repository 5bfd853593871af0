"""Whether memory stays flat over a run: `python -m bench.memory [--epochs 12] [--processes 1]`.

The tiny recipe's model trains on a weighted mixture of images, text and videos. Each epoch is
packed anew and ends with a validation, which also generates, and a checkpoint. Then the memory of
rank 0 and of its loader workers is read: anonymous and shared pages, each divided among those that
share it (Linux's Pss_Anon and Pss_Shmem), and the whole resident memory of rank 0.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from qwen35.config.load import load_settings
from qwen35.data import MicroBatches
from qwen35.launch.launcher import listen
from qwen35.tools.tiny import ASSETS, make_digits, make_model

FLAT = 8  # the last epochs, over which the slope is taken; those before them fill caches


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.memory", description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings over those of the recipe")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = [*write(folder), f"data.dataloader_param.num_workers={args.workers}", *args.overrides]
        recipe = f"{ASSETS.parent}/configs/tiny.yaml"
        steps = MicroBatches(load_settings(recipe, own), 0, args.processes).sequences_per_epoch // args.processes
        own += [f"training.{name}={steps}" for name in ("val_interval", "save_interval")]
        # one epoch more, since memory is read while the run goes on
        own.append(f"training.train_iters={steps * (args.epochs + 1)}")
        with listen(0) as free:
            port = free.getsockname()[1]
        launcher = ["-m", "qwen35.launch", "--nproc_per_node", str(args.processes), "--master_port", str(port)]
        print(
            f"{steps} steps an epoch, {args.processes} processes with {args.workers} workers for each loader",
            flush=True,
        )
        with (
            (folder / "log").open("w") as log,
            subprocess.Popen([sys.executable, *launcher, recipe, *own], stdout=log, stderr=log) as job,
        ):
            rows = [row for epoch in range(args.epochs) if (row := measure(job, folder / "run", steps * (epoch + 1)))]
            failed = job.wait()
        if failed:
            sys.exit((folder / "log").read_text()[-2000:])
    for epoch, row in enumerate(rows, 1):
        print(f"epoch {epoch:3}: " + ", ".join(f"{name} {mb:.1f} MB" for name, mb in row.items()))
    last = rows[-FLAT:]
    slopes = {name: np.polyfit(range(len(last)), [row[name] for row in last], 1)[0] for name in last[0]}
    print(f"over the last {len(last)} epochs: " + ", ".join(f"{n} {s:+.2f} MB an epoch" for n, s in slopes.items()))


def measure(job: "subprocess.Popen[bytes]", save: Path, step: int) -> dict[str, float]:
    """MB of rank 0, its workers and the sum, after the checkpoint of `step`; {} after the run."""
    while job.poll() is None:
        latest = save / "latest_checkpointed_iteration.txt"
        if latest.is_file() and int(latest.read_text()) >= step:
            ranks = [child for child in psutil.Process(job.pid).children() if "qwen35.train" in child.cmdline()]
            rank = min(ranks, key=lambda process: int(process.environ()["RANK"]))
            resident, own = memory(rank.pid)
            workers = [memory(worker.pid)[1] for worker in rank.children()]
            shares = {"rank": own, f"{len(workers)} workers": sum(workers), "sum": own + sum(workers)}
            return {"rank resident": resident, **shares}
        time.sleep(0.02)
    return {}


def memory(pid: int) -> tuple[float, float]:
    """MB that are resident, and MB of its own, without mapped files such as libraries."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(size.split()[0]) / 1e3 for name, size in (line.split(":", 1) for line in lines)}
    return sizes["Rss"], sizes["Pss_Anon"] + sizes["Pss_Shmem"]


def write(folder: Path) -> list[str]:
    """Write model and records; return the settings that name them."""
    make_model(folder / "model")
    make_digits(folder / "digits")
    digits = json.loads((folder / "digits/train.json").read_text())
    text = [exchange(f"What is {a} and {b}?", str(a + b)) for a in range(12) for b in range(12)]
    videos = [
        exchange("<video>\nWhich digits are these?", f"{i} and {i + 1}")
        | {"videos": [[f"images/{j:04}.png" for j in (i, i + 1)]]}
        for i in range(60)
    ]
    files = {"images": digits[:400], "text": text, "videos": videos}
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    weights = {"images": 1, "text": 0.5, "videos": 2}
    mixture = ", ".join(f"{{file: {folder}/{name}.json, weight: {weight}}}" for name, weight in weights.items())
    (folder / "heldout.json").write_text(json.dumps(digits[400:440] + text[:10]))
    basic = "dataset_param.basic_parameters"
    return [
        f"data.{basic}.dataset=[{mixture}]",
        f"data.{basic}.dataset_dir={folder}/digits",
        f"data.{basic}.cache_dir={folder}/cache",
        f"data.val_{basic}.dataset={folder}/heldout.json",
        f"model.model_name_or_path={folder}/model",
        "training.load=null",
        f"training.init_from_hf_path={folder}/model",
        f"training.save={folder}/run",
        "training.save_total_limit=2",
        "training.val_generate=true",
        "training.val_interval=1",  # replaced as soon as the length of an epoch is known
        "training.log_interval=5",
    ]


def exchange(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    main()
