"""What a run reports: metrics.jsonl, loss.png, and a progress bar or a line per log interval.

Values stay on the device between log intervals; one flush brings a whole interval to the host.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from qwen35.checkpoint.errors import abbreviate
from qwen35.checkpoint.folders import write_atomic
from qwen35.device import peak_memory
from qwen35.errors import UserError, naming
from qwen35.log import logger
from qwen35.training.parameter_groups import group_of
from qwen35.training.trackers import Tracker, scalars
from qwen35.wording import duration, number_of


class RunError(UserError):
    """A run cannot go on, for a reason that the user can do something about."""


@dataclass(frozen=True)
class StepRecord:
    """What the host knows of a step, and the values that are still on the device."""

    step: int  # steps done, this one included
    lr: float
    data_time: float  # seconds spent waiting for the micro-batches
    flops: float  # this rank's model FLOPs
    sums: Tensor  # [5 + …] this rank's share of SUMS, and of what `also` names
    group_squares: Tensor  # [G] squared gradient norms over all ranks, by group
    bad_records: tuple[str, ...] = ()  # messages about this rank's records that could not be trained
    load: Tensor | None = None  # [L, E] number of this rank's tokens that each expert of each layer got
    also: tuple[str, ...] = ()  # what the stage measures besides its loss


SUMS = ("loss", "aux_loss", "tokens", "label_tokens", "image_tokens")
MEASURED_STEPS = 5  # steps after the first flush before the run's time is estimated
HOST_SUMS = ("flops", "stop", "bad_records")  # summed over the ranks as well, but known on the host


class Metrics:
    """Collects StepRecords and flushes them at log intervals. All ranks call it; rank 0 writes."""

    def __init__(
        self,
        folder: Path,
        groups: list[str],
        total: int,
        done: int,
        device: torch.device,
        peak_tflops: float | None,
        steps_per_epoch: float = math.inf,
    ):
        self.path, self.groups, self.device = folder / "metrics.jsonl", groups, device
        self.total, self.steps_per_epoch = total, steps_per_epoch
        self.first_flush: tuple[int, float] | None = None  # step, time; the steps before it include warm-up
        self.peak = peak_tflops * 1e12 * dist.get_world_size() if peak_tflops else None
        self.trackers: Sequence[Tracker] = ()
        self.pending: list[StepRecord] = []
        self.last: dict[str, Any] = {}  # the last line of metrics.jsonl
        self.zero_steps = dict.fromkeys(groups, 0)  # consecutive steps with a gradient of zero
        self.is_estimated = False  # whether the remaining time has been logged
        self.logged: set[str] = set()  # messages about bad records, each of which is logged once
        self.expert_counts: Tensor | None = None  # [L, E] tokens of each expert, on the device
        self.is_writer = dist.get_rank() == 0
        self.bar = None
        if self.is_writer:
            self._cut_back(done)
            if sys.stderr.isatty():
                self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin the next interval now: what came before belongs to no step's time."""
        self.last_flush = time.perf_counter()

    def _cut_back(self, done: int) -> None:
        """Drop the lines after the checkpoint that the run resumes from. Copies a damaged file."""
        lines, damage = _read(self.path)
        if damage:
            copy = next(p for n in itertools.count(1) if not (p := self.path.with_suffix(f".damaged{n}")).exists())
            copy.write_bytes(self.path.read_bytes())
            logger.warning(
                f"{self.path}: {damage}; it keeps the lines that can be read, {copy.name} is the file as it was"
            )
        write_atomic(self.path, _text(line for line in lines if line["step"] <= done))

    def record(self, record: StepRecord) -> None:
        self.pending.append(record)

    def flush(self, patience: int, stop: bool = False) -> bool:
        """Reduce and log the interval. Returns whether any rank was asked to stop: all stop alike.

        patience: steps for which a group's gradient may be zero; stop: whether this rank has been
        asked to stop. Raises RunError where the loss is not finite or a group learns nothing.
        """
        records, self.pending = self.pending, []
        host_sums = torch.tensor([[r.flops, float(stop), len(r.bad_records)] for r in records], device=self.device)
        names = (*SUMS, *records[0].also, *HOST_SUMS)
        sums = torch.cat([torch.stack([r.sums for r in records]), host_sums], dim=1)  # [steps, names]
        dist.all_reduce(sums)
        columns = [sums, torch.stack([r.group_squares for r in records])]
        if all(r.load is not None for r in records):
            load = torch.stack([r.load for r in records if r.load is not None])  # [steps, L, E]
            dist.all_reduce(load)
            self.expert_counts = load.sum(0) if self.expert_counts is None else self.expert_counts + load.sum(0)
            columns.append(load.amax(-1) / load.mean(-1).clamp(min=1e-9))
        values = torch.cat(columns, dim=1).tolist()
        step_time = (time.perf_counter() - self.last_flush) / len(records)
        self.restart_clock()
        totals = [dict(zip(names, row, strict=False)) for row in values]
        end = len(names) + len(self.groups)
        squares = [row[len(names) : end] for row in values]
        lines = [self._line(*step, step_time) for step in zip(records, totals, squares, strict=True)]
        for line, row in zip(lines, values, strict=True):
            if len(row) > end:  # by layer: tokens of the busiest expert / mean over the experts
                line["expert_load"] = [round(ratio, 3) for ratio in row[end:]]
        if self.is_writer:
            self._append(_text(lines))
            for line in lines:
                self._track(line["step"], line)
            self._show(lines)
        self.last = lines[-1]
        if any(line["bad_records"] for line in lines):  # the same on all ranks
            self._log_bad_records([message for r in records for message in r.bad_records])
        for line, group_squares in zip(lines, squares, strict=True):
            self._check(line, group_squares, patience)
        return totals[-1]["stop"] > 0

    def take_expert_counts(self) -> Tensor:
        """[L, E]: how many tokens each expert has had in the steps flushed since the last call."""
        counts, self.expert_counts = self.expert_counts, None
        assert counts is not None
        return counts

    def _append(self, text: str, instead: str = "") -> None:
        """Append all of the text or nothing; if the file ends with `instead`, replace that."""
        if not self.path.exists():
            logger.warning(f"{self.path} has been removed; a new one begins with this step")
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
                os.fsync(file.fileno())  # a checkpoint must never be newer than the metrics on disk
        except OSError:
            os.truncate(self.path, end)
            raise

    def _track(self, step: int, values: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(step, scalars(values))

    def _log_bad_records(self, rank_messages: list[str]) -> None:
        """Log each bad record of any rank once."""
        messages: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(messages, rank_messages)
        for message in dict.fromkeys(message for part in messages for message in part):
            self._log_once(f"not trained: {message}")

    def _log_once(self, message: str) -> None:
        if self.is_writer and message not in self.logged:
            self.logged.add(message)
            logger.warning(message)

    def log_validation(self, metrics: dict[str, Any], bad_records: Iterable[str]) -> None:
        """Add a validation's metrics to the last step's line. Its time belongs to no step."""
        if self.is_writer:
            before = _text([self.last])
            self.last |= metrics
            self._append(_text([self.last]), instead=before)
            self._track(self.last["step"], metrics)
            for message in bad_records:
                self._log_once(f"not validated: {message}")
            values = "  ".join(f"{name} {value:.6g}" for name, value in metrics.items() if name != "val_time")
            logger.info(f"step {self.last['step']:6}  {values}  {metrics['val_time']:.2f} s")
        self.restart_clock()

    def _line(
        self, record: StepRecord, totals: dict[str, float], squares: list[float], step_time: float
    ) -> dict[str, Any]:
        line: dict[str, Any] = {
            "step": record.step,
            **{name: totals[name] for name in ("loss", *record.also, "aux_loss")},
            "grad_norm": sum(squares) ** 0.5,
            "grad_norms": self._by_kind(squares),
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

    def _by_kind(self, squares: list[float]) -> dict[str, float]:
        """The norms of groups, those of adapters together by the kind of what they adapt."""
        kinds: dict[str, float] = {}
        for name, square in zip(self.groups, squares, strict=True):
            kinds[group_of(name)] = kinds.get(group_of(name), 0.0) + square
        return {kind: square**0.5 for kind, square in kinds.items()}

    def _show(self, lines: list[dict[str, Any]]) -> None:
        last = lines[-1]
        names = {"mtp_loss": "mtp_loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
        also = "".join(f"{short} {last[name]:.4f}  " for name, short in names.items() if name in last)
        text = f"loss {last['loss']:.4f}  {also}grad_norm {last['grad_norm']:.3f}  lr {last['lr']:.2e}"
        text += f"  {last['tokens_per_second']:.0f} tokens/s"
        if math.isfinite(self.steps_per_epoch):
            text += f"  epoch {last['step'] / self.steps_per_epoch:.2f}"
        if "mfu" in last:
            text += f"  mfu {last['mfu']:.1%}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(len(lines))
        left, measured, pace = self.total - last["step"], 0, last["step_time"]
        if self.first_flush:
            measured = last["step"] - self.first_flush[0]
            pace = (self.last_flush - self.first_flush[1]) / measured  # with saves and validations
        self.first_flush = self.first_flush or (last["step"], self.last_flush)
        line = f"step {last['step']:6}  {text}  {last['step_time']:.2f} s  ETA {duration(pace * left)}"
        logger.info(line, extra={"file_only": self.bar is not None})
        if left and not self.is_estimated and measured >= MEASURED_STEPS:
            self.is_estimated = True
            logger.info(f"{number_of(left, 'step')} to go, about {duration(pace * left)} at the pace of the first ones")

    def _check(self, line: dict[str, Any], squares: list[float], patience: int) -> None:
        if not all(map(math.isfinite, (line["loss"], line["grad_norm"]))):
            broken = [name for name, square in zip(self.groups, squares, strict=True) if not math.isfinite(square)]
            groups = "all groups" if len(broken) == len(self.groups) else abbreviate(broken)
            where = f", in the gradient of {groups}" if groups else ""
            raise RunError(
                f"step {line['step']}: loss {line['loss']}, grad_norm {line['grad_norm']}: not a number{where};"
                " stopped, and nothing saved since. A resumed run would get there again: lower training.lr, or look at"
                " the data of that step"
            )
        for name, square in zip(self.groups, squares, strict=True):
            if "visual" in name and line["image_tokens"] == 0:
                continue  # a step without images has no gradient for the vision tower
            self.zero_steps[name] = self.zero_steps[name] + 1 if square == 0 else 0
            if self.zero_steps[name] >= patience:
                raise RunError(
                    f"step {line['step']}: the gradient of {name} has been exactly zero for {patience} steps, so it learns"
                    f" nothing; freeze it (model.freeze; an adapter: training.lora.exclude_modules), look at the data, or"
                    " raise training.zero_grad_patience"
                )

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        if self.bar is not None:
            self.bar.close()


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without the damaged ones."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """-> the lines, and what is wrong with the first bad one."""
    numbered = list(iterate_metrics(path))
    bad = next((number for number, line in numbered if line is None), None)
    damage = "" if bad is None else f"line {bad} is not the metrics of a step"
    return [line for _, line in numbered if line is not None], damage


def iterate_metrics(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and values of each line, None for a damaged one; without a truncated last line.

    Raises RunError.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise RunError(f"{path}: not a file; move it away")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if isinstance(values, dict) and type(values.get("step")) is int:
                yield number, values
            elif line.endswith(b"\n"):
                yield number, None
