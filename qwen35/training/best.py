"""The best validation so far: its checkpoint is kept, and a run may end where none is better."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qwen35.checkpoint.dcp import EXTRA, CheckpointInfo
from qwen35.checkpoint.dcp_folder import checkpoint_name, damaged, is_complete, write_best
from qwen35.config.schema import TrainingSettings
from qwen35.log import log_warnings, logger
from qwen35.wording import number_of

KEY = "best_validation"  # in extra.json
TYPES = {"figure": str, "value": float, "step": int, "since": int, "data": str}


@dataclass
class Best:
    """The same on all ranks. Each checkpoint holds it, so that a resumed run goes on with it."""

    figure: str  # that is compared: loss, of which the lowest is best, or exact_match
    value: float | None = None  # None before the first validation
    step: int = 0
    since: int = 0  # validations after it
    data: str = ""  # fingerprint of what the validations were on

    @classmethod
    def before(cls, t: TrainingSettings, checkpoint: CheckpointInfo | None, data: str = "") -> "Best":
        """What a checkpoint says. data: a fingerprint of the validation data, "" if unknown.

        Figures of other validation data are not compared. Raises CheckpointError for a damaged one.
        """
        best = cls(t.save_best or "loss", data=data)
        state: Any = checkpoint.extra.get(KEY) if checkpoint else None
        if checkpoint is None or state is None:
            return best
        state = {"data": data} | state if isinstance(state, dict) else {}  # checkpoints of before do not say
        if {name: type(value) for name, value in state.items()} != TYPES:
            raise damaged(checkpoint.path, EXTRA, f"does not hold {KEY} as a run writes it")
        if data and state["data"] != data:
            log_warnings(["the validation data have changed since the checkpoint: the best is found anew"])
            return best
        return cls(**state) if state["figure"] == best.figure else best

    @classmethod
    def of(cls, t: TrainingSettings, checkpoint: CheckpointInfo | None, data: str = "") -> "Best":
        """At the start of a run, from the checkpoint that it resumes from. All ranks call it.

        With save_best the file that names the best checkpoint says the same afterwards, if another
        job was stopped before it could. Raises CheckpointError for a damaged checkpoint.
        """
        best = cls.before(t, checkpoint, data)
        if not t.save_best:
            return best
        folder = Path(t.save)
        kept: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(kept, best.value is not None and is_complete(folder / checkpoint_name(best.step)))
        if best.value is not None and not kept[0]:
            logger.info(
                f"{folder} has no {checkpoint_name(best.step)}, whose validation was best: the best is found anew"
            )
            best = cls(best.figure, data=data)
        if dist.get_rank() == 0:
            write_best(folder, best.step if kept[0] else None)
        return best

    def add(self, step: int, found: dict[str, Any]) -> None:
        """Take the metrics of a validation. It is the best if it is better than all before."""
        value = found.get(f"val_{self.figure}", math.nan)
        sign = 1 if self.figure == "loss" else -1
        if not math.isnan(value) and (self.value is None or sign * value < sign * self.value):
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1

    def why_over(self, patience: int | None) -> str:
        """Why early_stopping_patience ends the run; empty: it does not."""
        if patience is None or self.since < patience:
            return ""
        best = "no validation" if self.value is None else f"{self.figure} {self.value:.6g} of step {self.step}"
        return f"early stopping: {number_of(self.since, 'validation')} in a row not better than {best}"

    def extra(self) -> dict[str, Any]:
        """What a checkpoint's extra.json holds of it."""
        return {} if self.value is None else {KEY: asdict(self)}

    def message(self, folder: str) -> str:
        """For the end of a run: which checkpoint it is; empty without one."""
        if self.value is None:
            return ""
        name = f"{folder}/{checkpoint_name(self.step)}"
        return (
            f"{name} has the best validation, {self.figure} {self.value:.6g}: name it to use it instead of the newest"
        )
