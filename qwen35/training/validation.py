"""Validation between two steps: loss and exact match. It does not affect the training."""

import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from kernels.host import to_device
from qwen35.batch import IGNORE
from qwen35.config.schema import DatasetParam, Settings, for_validation
from qwen35.data import RecordError
from qwen35.data.dataset import Dataset
from qwen35.data.tokenized import Progress
from qwen35.data.validation import ValidationSet
from qwen35.device import has_own_memory
from qwen35.errors import SettingError
from qwen35.heartbeat import Heartbeat
from qwen35.inference.evaluate import is_right
from qwen35.inference.generate import GREEDY
from qwen35.inference.generation_config import greedy_sampling, read_generation_config
from qwen35.inference.predict import Answer, Asking
from qwen35.log import log_warnings, logger
from qwen35.model import Qwen35
from qwen35.parallel.context_parallel import shard_batch
from qwen35.parallel.fsdp import gather_weights, replicated, reshard
from qwen35.parallel.mesh import Meshes
from qwen35.training.adapters import build_model
from qwen35.training.dpo import METRICS, preference_loss
from qwen35.training.history import MOST_ANSWERS
from qwen35.training.loss import make_mtp_targets, token_loss, token_weights
from qwen35.wording import number_of


class Validation:
    """All ranks make the same number of forward passes, so that their collectives match."""

    def __init__(
        self,
        settings: Settings,
        meshes: Meshes,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
        train_set: DatasetParam | None = None,
    ):
        """settings: `Settings.validation`; train_set: files in both sets are reported.

        Raises SettingError, RecordError.
        """
        self.settings, self.meshes, self.device, self.dtype = settings, meshes, device, dtype
        self.sampling = GREEDY
        self.answers: list[Answer] = []  # the first of rank 0, of the last validation
        if settings.training.val_generate:
            self.sampling = greedy_sampling(read_generation_config(settings.model.model_name_or_path))
        try:
            rank, ranks = meshes.data_rank, meshes.data_size
            self.set = ValidationSet(settings, rank, ranks, progress, has_own_memory(device), train_set)
            self.groups = self.set.records_for_generation(progress) if settings.training.val_generate else []
            if settings.training.save_best == "exact_match" and not self.groups:
                raise SettingError("training.save_best: exact_match: all validation records are longer than cutoff_len")
        except (SettingError, RecordError) as error:
            raise type(error)(for_validation(str(error))) from None

    def is_due(self, step: int, steps: int) -> bool:
        assert self.settings.training.val_interval is not None
        return step % self.settings.training.val_interval == 0 or step == steps

    def report(self, trained: Dataset | None = None) -> str:
        """The line for the start of a run. trained: what it trains on, to compare the samples."""
        dataset, t = self.set.dataset, self.settings.training
        skipped = f"; skipped {len(dataset.skipped):,}: {dataset.skipped}" if len(dataset.skipped) else ""
        truncated = f"; cut {len(dataset.truncated.numbers):,} to cutoff_len" if dataset.truncated.numbers else ""
        answered, masked = sum(map(len, self.groups)), self.set.masked
        left = ["longer than cutoff_len"] * (answered + masked < len(dataset))
        left += ["whose loss mask leaves the last answer out"] * bool(masked)
        left_out = f" (not those {' or '.join(left)})" if left else ""
        sampling = "" if self.sampling == GREEDY else f" ({self.sampling})"
        generation = f", {answered:,} of them answered{left_out}{sampling}" if t.val_generate else ""
        shared = ", ".join(map(str, self.set.training_overlap))
        warnings = f"; {shared} is also trained on" * bool(shared) + "".join(f"; {line}" for line in dataset.warnings)
        if both := self.set.also_trained(trained) if trained else []:
            verb = "is" if len(both) == 1 else "are"
            warnings = (
                f"; {number_of(len(both), dataset.unit)} of these {verb} also trained on, first {both[0]}{warnings}"
            )
        return (
            f"validation every {number_of(t.val_interval or 0, 'step')}: {number_of(len(dataset), dataset.unit)}{generation}, "
            f"{number_of(len(self.set), 'micro-batch')} a rank{truncated}{skipped}{for_validation(warnings)}"
        )

    def log_report(self, trained: Dataset) -> None:
        """As a warning if anything is left out or odd."""
        text = self.report(trained)
        if "; " in text:
            log_warnings([text])
        else:
            logger.info(text)

    def run(self, model: Qwen35, heartbeat: Heartbeat, step: int) -> tuple[dict[str, Any], list[str]]:
        """-> metrics of the sharded model, messages about records left out; the same on all ranks.

        Losses are means over all tokens with a label, whatever the loss_type, or over all pairs.
        Raises RecordError for an image that cannot be decoded.
        """

        def beat(activity: str) -> None:
            heartbeat.at(f"step {step}: validation, {activity}")

        start = time.perf_counter()
        recompute = model.model.language_model.recompute
        model.recompute(False)
        try:
            sums, tokens, bad = self._losses(model, beat)
            right, answered = self._answers(model, beat, bad) if self.settings.training.val_generate else (0, 0)
        finally:
            model.recompute(recompute)
        beat("waiting for the other ranks")
        rank_values = (*sums, *tokens, right, answered, bad)
        all_values: list[Any] = [rank_values] * dist.get_world_size()
        dist.all_gather_object(all_values, rank_values)
        *totals, rank_messages = zip(*all_values, strict=True)
        *all_sums, labels, others, right, answered = (sum(values) for values in totals)
        messages = list(dict.fromkeys(chain.from_iterable(rank_messages)))
        is_dpo = self.settings.training.stage == "dpo"
        divisors = [others if is_dpo else labels, *[others] * (len(all_sums) - 1)]
        losses = zip(("loss", *(METRICS if is_dpo else ("mtp_loss",))), all_sums, divisors, strict=False)
        metrics = {
            **{f"val_{name}": total / max(divisor, 1) for name, total, divisor in losses},
            "val_tokens": labels,
            "val_exact_match": right / answered if answered else None,
            "val_bad_records": len(messages) or None,
            "val_time": time.perf_counter() - start,
        }
        return {name: value for name, value in metrics.items() if value is not None}, messages

    @torch.no_grad()
    def _losses(self, model: Qwen35, beat: Callable[[str], None]) -> tuple[list[float], list[int], list[str]]:
        """-> this rank's sums, numbers of labels, of MTP's or of pairs, bad records.

        The sums are cross entropies (next token, MTP), or those of `preference_loss`.
        """
        rank, size, t = self.meshes.ulysses_rank, self.meshes.ulysses_size, self.settings.training
        sums, tokens = [], [0, 0]
        bad: list[str] = []
        for i, batch in enumerate(self.set, 1):
            beat(f"micro-batch {i} of {len(self.set)}")
            mtp_targets = make_mtp_targets(batch, "per_token_loss") if self.settings.model.mtp_num_layers else None
            if rank == 0:  # only one of the ranks that share packed sequences counts them
                tokens[0] += int((batch.labels != IGNORE).sum())
                tokens[1] += len(mtp_targets.label_positions) if mtp_targets else 0
                tokens[1] += len(batch.pairs) if batch.pairs is not None else 0
                bad += batch.bad_records
            part, weights, mtp_targets = shard_batch(
                batch, token_weights(batch, "per_token_loss"), mtp_targets, rank, size
            )
            part, weights = part.to(self.device), to_device(weights, self.device)
            mtp_targets = mtp_targets.to(self.device) if mtp_targets else None
            if part.pairs is not None:
                *_, found = preference_loss(model, part, t.dpo, self.meshes, torch.ones((), device=self.device))
            else:
                *_, found = token_loss(model, part, weights, mtp_targets, 1.0, None)
            sums.append(torch.stack(found))
        reshard(model)
        return torch.stack(sums).cpu().double().sum(0).tolist(), tokens, bad

    def _answers(self, model: Qwen35, beat: Callable[[str], None], bad: list[str]) -> tuple[int, int]:
        """-> this rank's right answers and all its answers; broken records are reported in `bad`.

        The ranks generate different numbers of tokens, so each has an unsharded copy of the model.
        """
        beat("gathering an unsharded copy of the model")
        plain = build_model(self.settings, model.config, model.kernels).to(self.dtype)
        for parameter in replicated(plain):
            parameter.data = parameter.data.float()
        gather_weights(model, plain.to_empty(device=self.device))
        folder, dataset = self.settings.model.model_name_or_path, self.set.dataset
        skip = (lambda error: bad.append(str(error))) if dataset.skips_bad_records else None
        asking = Asking(folder, dataset.preparation, self.sampling)
        right = answered = 0
        self.answers = []
        groups = self.groups[dist.get_rank() :: dist.get_world_size()]
        for i, records in enumerate(groups, 1):
            beat(f"answers {i} of {len(groups)}")
            for found in asking.answers(plain, records, len(records), skip=skip):
                self.answers += found[: (MOST_ANSWERS - len(self.answers)) * (dist.get_rank() == 0)]
                right += sum(map(is_right, found))
                answered += len(found)
        return right, answered
