"""How a model does on records that it is not trained on, between two steps. Nothing of the training's course depends on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kernels.host import to_device
from qwen35.batch import IGNORE
from qwen35.config.schema import DatasetParam, Settings, for_validation
from qwen35.data import RecordError
from qwen35.data.tokenized import Progress
from qwen35.data.validation import ValidationSet
from qwen35.device import is_apart
from qwen35.errors import SettingError
from qwen35.heartbeat import Heartbeat
from qwen35.inference.evaluate import GREEDY, answers
from qwen35.inference.generation_config import greedy_sampling, read_generation_config
from qwen35.model import Qwen35
from qwen35.parallel.context_parallel import shard_batch
from qwen35.parallel.fsdp import gather_weights, replicated, reshard
from qwen35.parallel.mesh import Meshes
from qwen35.training.loss import make_mtp_targets, token_weights
from qwen35.wording import number_of


@dataclass(frozen=True)
class Result:
    """Of all ranks."""

    loss: float  # mean cross entropy of all trained tokens of the set, whatever the loss_type
    tokens: int  # of them
    mtp_loss: float | None  # the same of multi-token prediction, where that is trained
    exact_match: float | None  # share of the records that are answered as they stand, where that is asked for
    bad_records: tuple[str, ...]  # what is wrong with those that took no part
    seconds: float  # that it took

    def metrics(self) -> dict[str, Any]:
        found = {
            "val_loss": self.loss,
            "val_mtp_loss": self.mtp_loss,
            "val_tokens": self.tokens,
            "val_exact_match": self.exact_match,
            "val_bad_records": len(self.bad_records) or None,
            "val_time": self.seconds,
        }
        return {name: value for name, value in found.items() if value is not None}


class Validation:
    """Every rank makes the same number of forward passes, so no collective waits for one that does not come."""

    def __init__(
        self,
        settings: Settings,
        meshes: Meshes,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
        trained: DatasetParam | None = None,
    ):
        """settings: those of the validation, `Settings.validation`; trained: of the records that are trained on.

        Raises SettingError, RecordError.
        """
        self.settings, self.meshes, self.device, self.dtype = settings, meshes, device, dtype
        self.sampling = GREEDY
        if settings.training.val_generate:
            self.sampling = greedy_sampling(read_generation_config(settings.model.model_name_or_path))
        try:
            rank, ranks = meshes.data_rank, meshes.data_size
            self.set = ValidationSet(settings, rank, ranks, progress, is_apart(device), trained)
            self.groups = self.set.records_for_generation(progress) if settings.training.val_generate else []
        except (SettingError, RecordError) as error:
            raise type(error)(for_validation(str(error))) from None

    def is_due(self, step: int) -> bool:
        t = self.settings.training
        assert t.val_interval is not None
        return step % t.val_interval == 0 or step == t.train_iters

    def report(self) -> str:
        """For the start of a run."""
        dataset, t = self.set.dataset, self.settings.training
        left_out = f"; skipped {len(dataset.skipped):,}: {dataset.skipped}" if len(dataset.skipped) else ""
        cut = f"; cut {len(dataset.truncated.numbers):,} to cutoff_len" if dataset.truncated.numbers else ""
        asked, without = sum(map(len, self.groups)), ""
        if asked < len(dataset):
            without = " (none that is longer than cutoff_len)"
        how = "" if self.sampling == GREEDY else f" ({self.sampling})"
        told = f", {asked:,} of them answered{without}{how}" if t.val_generate else ""
        both = ", ".join(map(str, self.set.training_overlap))
        odd = f"; of these, {both} is trained on too" * bool(both) + "".join(f"; {line}" for line in dataset.warnings)
        return (
            f"validation every {number_of(t.val_interval or 0, 'step')}: {number_of(len(dataset), 'sample')}{told}, "
            f"{number_of(len(self.set), 'micro-batch')} a rank{cut}{left_out}{for_validation(odd)}"
        )

    def run(self, model: Qwen35, heartbeat: Heartbeat, step: int) -> Result:
        """Of the sharded model. Raises RecordError for an image that turns out broken."""

        def at(what: str) -> None:
            heartbeat.at(f"step {step}: validation, {what}")

        start = time.perf_counter()
        recompute = model.model.language_model.recompute
        model.recompute(False)
        try:
            sums, tokens, bad = self._losses(model, at)
            right, answered = self._answers(model, at, bad) if self.settings.training.val_generate else (0, 0)
        finally:
            model.recompute(recompute)
        at("waiting for the others")
        mine = (*sums, *tokens, right, answered, bad)
        found: list[Any] = [mine] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        loss, mtp, trained, further, right, answered = (sum(values) for values in list(zip(*found, strict=True))[:-1])
        return Result(
            loss / max(trained, 1),
            trained,
            mtp / max(further, 1) if self.settings.model.mtp_num_layers else None,
            right / answered if answered else None,
            tuple(dict.fromkeys(message for part in found for message in part[-1])),
            time.perf_counter() - start,
        )

    @torch.no_grad()
    def _losses(self, model: Qwen35, at: Callable[[str], None]) -> tuple[list[float], list[int], list[str]]:
        """This rank's sums of cross entropy and numbers of tokens, (next token, token after the next); broken records."""
        rank, size = self.meshes.ulysses_rank, self.meshes.ulysses_size
        sums, tokens = [], [0, 0]
        bad: list[str] = []
        for i, batch in enumerate(self.set, 1):
            at(f"micro-batch {i} of {len(self.set)}")
            mtp_targets = make_mtp_targets(batch, "per_token_loss") if self.settings.model.mtp_num_layers else None
            if rank == 0:  # of ranks that share their bins one counts them
                tokens[0] += int((batch.labels != IGNORE).sum())
                tokens[1] += len(mtp_targets.label_positions) if mtp_targets else 0
                bad += batch.bad_records
            part, weights, mtp_targets = shard_batch(
                batch, token_weights(batch, "per_token_loss"), mtp_targets, rank, size
            )
            part, weights = part.to(self.device), to_device(weights, self.device)
            mtp_targets = mtp_targets.to(self.device) if mtp_targets else None
            _, _, losses = model.loss(part, weights, mtp_targets)
            sums.append(torch.stack([losses[: len(weights)].sum(), losses[len(weights) :].sum()]))
        reshard(model)
        return torch.stack(sums).cpu().double().sum(0).tolist(), tokens, bad

    def _answers(self, model: Qwen35, at: Callable[[str], None], bad: list[str]) -> tuple[int, int]:
        """How many of this rank's share of the records are answered right, and how many are; `bad` gets the broken ones.

        The ranks' answers take different numbers of steps, so each rank asks a whole, plain copy of the model.
        """
        at("a whole copy of the model to ask")
        with torch.device("meta"):
            plain = Qwen35(model.config, kernels=model.kernels, mtp=hasattr(model, "mtp")).to(self.dtype)
        for parameter in replicated(plain):
            parameter.data = parameter.data.float()
        gather_weights(model, plain.to_empty(device=self.device))
        folder, dataset = self.settings.model.model_name_or_path, self.set.dataset
        skip = (lambda error: bad.append(str(error))) if dataset.skips_bad_records else None
        right = answered = 0
        mine = self.groups[dist.get_rank() :: dist.get_world_size()]
        for i, records in enumerate(mine, 1):
            at(f"answers {i} of {len(mine)}")
            asked = dataset.preparation, records, len(records)
            for answer in answers(plain, folder, *asked, sampling=self.sampling, skip=skip):
                right += answer.is_right
                answered += 1
        return right, answered
