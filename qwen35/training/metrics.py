"""What a run reports: metrics.jsonl, loss.png, the progress bar or a line a log interval.

Values stay on the device between log intervals; one flush brings the whole interval to the host.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from qwen35.checkpoint.folders import write_atomic
from qwen35.device import peak_memory
from qwen35.errors import UserError, naming
from qwen35.log import logger


class RunError(UserError):
    """A run that cannot go on, in words for its user."""


@dataclass(frozen=True)
class StepRecord:
    """One step, as far as the host knows it, and the values that are still on the device."""

    step: int  # steps done, this one included
    lr: float
    data_time: float  # seconds that the step waited for its batch
    flops: float  # model FLOPs of this rank's part
    sums: Tensor  # [5 or 6] this rank's parts of SUMS
    group_squares: Tensor  # [G] squared gradient norms of all ranks, by group
    bad_records: tuple[str, ...] = ()  # what is wrong with those of this rank's samples that were not trained
    load: Tensor | None = None  # [L, E] how often this rank's tokens chose each expert of each layer


SUMS = ("loss", "aux_loss", "tokens", "label_tokens", "image_tokens", "mtp_loss")  # the last where that is trained
HOST_SUMS = ("flops", "stop", "bad_records")  # what else is summed over the ranks


class Metrics:
    """Collects StepRecords, flushes them at log intervals. Every rank calls it; rank 0 writes."""

    def __init__(
        self, folder: Path, groups: list[str], total: int, done: int, device: torch.device, peak_tflops: float | None
    ):
        self.path, self.groups, self.device = folder / "metrics.jsonl", groups, device
        self.peak = peak_tflops * 1e12 * dist.get_world_size() if peak_tflops else None
        self.pending: list[StepRecord] = []
        self.last: dict[str, Any] = {}  # the line of the last step that is written
        self.zero_steps = dict.fromkeys(groups, 0)
        self.named: set[str] = set()  # bad records that the console has seen
        self.is_writer = dist.get_rank() == 0
        self.bar = None
        if self.is_writer:
            self._cut_back(done)
            if sys.stderr.isatty():
                self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)
        self.restart_clock()

    def restart_clock(self) -> None:
        """What comes now is not part of any step."""
        self.last_flush = time.perf_counter()

    def _cut_back(self, done: int) -> None:
        """Drop the lines after the checkpoint that the run goes on from. A file with other lines is kept beside it."""
        lines, strange = _read(self.path)
        if strange:
            copy = next(p for n in itertools.count(1) if not (p := self.path.with_suffix(f".damaged{n}")).exists())
            copy.write_bytes(self.path.read_bytes())
            logger.warning(f"{self.path}: {strange}; what can be read stays in it, and {copy.name} is what it was")
        write_atomic(self.path, _text(line for line in lines if line["step"] <= done))

    def record(self, record: StepRecord) -> None:
        self.pending.append(record)

    def flush(self, patience: int, stop: bool = False) -> bool:
        """One all-reduce and one copy for the whole interval. Raises RunError where the run has stopped making sense.

        stop: whether this rank has been asked to stop. Returns whether any has: here the ranks meet, so all stop alike.
        """
        records, self.pending = self.pending, []
        mine = torch.tensor([[r.flops, float(stop), len(r.bad_records)] for r in records], device=self.device)
        names = (*SUMS[: len(records[0].sums)], *HOST_SUMS)
        sums = torch.cat([torch.stack([r.sums for r in records]), mine], dim=1)  # [steps, names]
        dist.all_reduce(sums)
        columns = [sums, torch.stack([r.group_squares for r in records])]
        if all(r.load is not None for r in records):
            load = torch.stack([r.load for r in records if r.load is not None])  # [steps, L, E]
            dist.all_reduce(load)
            columns.append(load.amax(-1) / load.mean(-1).clamp(min=1e-9))
        values = torch.cat(columns, dim=1).tolist()
        step_time = (time.perf_counter() - self.last_flush) / len(records)
        self.restart_clock()
        totals = [dict(zip(names, row, strict=False)) for row in values]
        end = len(names) + len(self.groups)
        squares = [row[len(names) : end] for row in values]
        lines = [self._line(*of_step, step_time) for of_step in zip(records, totals, squares, strict=True)]
        for line, row in zip(lines, values, strict=True):
            if len(row) > end:  # of each layer: the busiest expert's tokens / the mean of all experts'
                line["expert_load"] = [round(ratio, 3) for ratio in row[end:]]
        if self.is_writer:
            self._append(_text(lines))
            self._show(lines)
        self.last = lines[-1]
        if any(line["bad_records"] for line in lines):  # the same on all ranks
            self._name([message for r in records for message in r.bad_records])
        for line, of_groups in zip(lines, squares, strict=True):
            self._check(line, of_groups, patience)
        return totals[-1]["stop"] > 0

    def _append(self, text: str, instead: str = "") -> None:
        """All of it, or nothing. `instead` of what the file ends with, if it still does."""
        if not self.path.exists():
            logger.warning(f"{self.path} is gone, somebody removed it: it begins anew with this step")
        with naming(self.path), self.path.open("a+b") as before:
            end = max(0, before.seek(0, os.SEEK_END) - len(instead))
            before.seek(end)
            if before.read() == instead.encode():
                before.truncate(end)
            end = before.seek(0, os.SEEK_END)
        try:
            with naming(self.path), self.path.open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # a checkpoint that comes after it must find it there, whatever happens
        except OSError:
            os.truncate(self.path, end)
            raise

    def _name(self, mine: list[str]) -> None:
        """Tell each bad record of any rank once."""
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine)
        for message in dict.fromkeys(message for part in found for message in part):
            self._tell_once(f"not trained: {message}")

    def _tell_once(self, message: str) -> None:
        if self.is_writer and message not in self.named:
            self.named.add(message)
            logger.warning(message)

    def validated(self, found: dict[str, Any], bad_records: Iterable[str]) -> None:
        """Put onto the last step's line what a validation has found. No step's time counts it."""
        if self.is_writer:
            before = _text([self.last])
            self.last |= found
            self._append(_text([self.last]), instead=before)
            for message in bad_records:
                self._tell_once(f"not validated: {message}")
            values = "  ".join(f"{name} {value:.6g}" for name, value in found.items() if name != "val_time")
            logger.info(f"step {self.last['step']:6}  {values}  {found['val_time']:.2f} s")
        self.restart_clock()

    def _line(
        self, record: StepRecord, totals: dict[str, float], squares: list[float], step_time: float
    ) -> dict[str, Any]:
        line: dict[str, Any] = {
            "step": record.step,
            **{name: totals[name] for name in ("loss", "mtp_loss", "aux_loss") if name in totals},
            "grad_norm": sum(squares) ** 0.5,
            "lr": record.lr,
            **{name: int(totals[name]) for name in ("tokens", "label_tokens", "image_tokens", "bad_records")},
            "step_time": step_time,
            "data_time": record.data_time,
            "tokens_per_second": totals["tokens"] / step_time,
            "memory": peak_memory(self.device),
        }
        if self.peak:
            line["mfu"] = totals["flops"] / step_time / self.peak
        return line

    def _show(self, lines: list[dict[str, Any]]) -> None:
        last = lines[-1]
        further = f"mtp_loss {last['mtp_loss']:.4f}  " if "mtp_loss" in last else ""
        text = f"loss {last['loss']:.4f}  {further}grad_norm {last['grad_norm']:.3f}  lr {last['lr']:.2e}"
        text += f"  {last['tokens_per_second']:.0f} tokens/s"
        if "mfu" in last:
            text += f"  mfu {last['mfu']:.1%}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(len(lines))
        line = f"step {last['step']:6}  {text}  {last['step_time']:.2f} s"
        logger.info(line, extra={"file_only": self.bar is not None})

    def _check(self, line: dict[str, Any], squares: list[float], patience: int) -> None:
        if not all(map(math.isfinite, (line["loss"], line["grad_norm"]))):
            broken = [name for name, square in zip(self.groups, squares, strict=True) if not math.isfinite(square)]
            groups = "all groups" if len(broken) == len(self.groups) else ", ".join(broken)
            where = f", in the gradient of {groups}" if groups else ""
            raise RunError(
                f"step {line['step']}: loss {line['loss']}, grad_norm {line['grad_norm']}: not a number"
                f"{where}; stopped, and nothing saved since. From the newest checkpoint it would come again: lower training.lr,"
                f" or look at that step's data"
            )
        for name, square in zip(self.groups, squares, strict=True):
            if name.startswith("visual") and line["image_tokens"] == 0:
                continue  # nothing for the tower to learn from in this step
            self.zero_steps[name] = self.zero_steps[name] + 1 if square == 0 else 0
            if self.zero_steps[name] >= patience:
                raise RunError(
                    f"step {line['step']}: the gradient of {name} has been exactly zero for {patience} steps; it trains"
                    f" nothing. Freeze it (model.freeze), or look at the data (training.zero_grad_patience is the limit)"
                )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_metrics(path: Path, only: Collection[str] = ()) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or these values of them; what is none is left out."""
    return _read(path, only)[0]


def _read(path: Path, only: Collection[str] = ()) -> tuple[list[dict[str, Any]], str]:
    """And what is wrong with the first line that is none, but for a last one that was cut off while it was written."""
    lines: list[dict[str, Any]] = []
    strange = ""
    if not path.exists():
        return lines, strange
    if not path.is_file():
        raise RunError(f"{path}: not a file; move it away")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if isinstance(values, dict) and type(values.get("step")) is int:
                lines.append({name: value for name, value in values.items() if name in only} if only else values)
            elif line.endswith(b"\n"):
                strange = strange or f"line {number} is not a step's"
    return lines, strange


def draw_loss(folder: Path) -> None:
    """<folder>/metrics.jsonl -> <folder>/loss.png"""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    # of a long run all of them would be half a gigabyte
    drawn = ("step", "lr", "loss", "mtp_loss", "val_loss", "val_mtp_loss", "val_exact_match")
    lines = read_metrics(folder / "metrics.jsonl", drawn)
    with_answers = any("val_exact_match" in line for line in lines)
    figure, axes = plt.subplots(1 + with_answers, figsize=(8, 6 if with_answers else 4.5), sharex=True, squeeze=False)
    axis, last = axes[0, 0], axes[-1, 0]
    for name, place, color, marker in (
        ("loss", axis, "tab:blue", ""),
        ("mtp_loss", axis, "tab:orange", ""),
        ("val_loss", axis, "tab:red", "."),
        ("val_mtp_loss", axis, "tab:brown", "."),
        ("val_exact_match", last, "tab:green", "."),
    ):
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        if points:
            place.plot(*zip(*points, strict=True), color=color, linewidth=1, marker=marker, label=name)
    if len(axis.lines) > 1:
        axis.legend()
    axis.set(ylabel="loss", title=str(folder))
    last.set(xlabel="step")
    if with_answers:
        last.set(ylabel="exact match", ylim=(0, 1.02))
    rate = axis.twinx()
    points = [(line["step"], line["lr"]) for line in lines if isinstance(line.get("lr"), int | float)]
    rate.plot(*zip(*points, strict=True), color="tab:gray", linewidth=0.8, linestyle="--")
    rate.set_ylabel("learning rate", color="tab:gray")
    figure.tight_layout()
    partial = folder / "loss.tmp.png"
    try:
        with naming(folder / "loss.png"):
            figure.savefig(partial, dpi=120)
            partial.replace(folder / "loss.png")
    finally:
        partial.unlink(missing_ok=True)
        plt.close(figure)
