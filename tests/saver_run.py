"""A small training run that saves with Saver, and kills itself by -9 at a given moment."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from qwen35.checkpoint.async_save import Saver
from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.checkpoint.dcp_folder import ITERATION, newest_checkpoint
from qwen35.checkpoint.folders import remove_leftovers
from qwen35.checkpoint.lock import holding

STEPS, INTERVAL, LIMIT = 120, 3, 2
BEGINS = 12  # the step in which `late` gets its first gradient


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(16, 32)
        self.second = torch.nn.Linear(32, 1)
        self.late = torch.nn.Parameter(torch.randn(16))
        self.frozen = torch.nn.Parameter(torch.randn(5), requires_grad=False)


def adam(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train_step(model: Toy, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    y = model.second(torch.tanh(model.first(x * model.late if step >= BEGINS else x)))
    y.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def write(file: Path, **values: object) -> None:
    """Append an event to the log, which survives the kill."""
    with file.open("a") as lines:
        lines.write(json.dumps(values) + "\n")


def die_at(folder: Path, number: int | None, moment: tuple[str, str] | None) -> None:
    """Kill -9 this process at its n-th step or file operation, or at an audit event on a path."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if not args or not str(args[0]).startswith(str(folder)):
            return
        count += 1
        if count == number or (moment and event == moment[0] and str(args[0]).endswith(moment[1])):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(
    folder: Path,
    background: bool,
    number: int | None = None,
    moment: tuple[str, str] | None = None,
    last: int = STEPS,
    interval: int = INTERVAL,
) -> None:
    """Train from the newest complete checkpoint to step `last`, logging to `<folder>.log`."""
    torch.set_num_threads(1)
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with holding(folder):
        remove_leftovers(folder, ITERATION)
        model = Toy()
        optimizer = adam(model)
        newest = newest_checkpoint(folder)
        step = (load_checkpoint(newest, model, optimizer).step or 0) if newest else 0
        write(log, start=step)
        die_at(folder, number, moment)
        with Saver(folder, model, optimizer, background, LIMIT) as saver:
            while step < last:
                train_step(model, optimizer, step)
                step += 1
                sys.audit("run.step", folder)
                saver.check()
                if step % interval == 0 or step == last:
                    saver.save(step, {"step": step}, {}, is_last=step == last)
                    write(log, begun=step)
    write(log, end=step)
    os._exit(0)
