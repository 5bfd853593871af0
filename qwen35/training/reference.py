"""Log-probabilities of a data set's answers by the reference, which a run of all weights begins as.

They are computed once, before the first step, and kept in a file in cache_dir, without one in the
save folder: so no second model is ever in memory. Its name is a digest of weights, data and dtype.
Its first line says for what it is, each further one holds a micro-batch of all ranks: one that was
interrupted goes on there.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwen35.batch import PackedBatch
from qwen35.checkpoint.dcp_write import run_sharing_errors
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.tensor_file import checksum
from qwen35.config.schema import Settings
from qwen35.data.background import background_loader
from qwen35.data.dataloader import DecodedBatches
from qwen35.data.dataset import Dataset
from qwen35.data.validation import each_once
from qwen35.device import has_own_memory
from qwen35.errors import UserError
from qwen35.log import logger
from qwen35.model import Qwen35
from qwen35.parallel.context_parallel import shard_batch
from qwen35.parallel.fsdp import reshard
from qwen35.parallel.mesh import Meshes
from qwen35.training.dpo import answer_log_probs
from qwen35.training.start import REFERENCE

Rows = list[tuple[int, float, float]]  # a pair's number, log-probabilities of its chosen and rejected answers


class ReferenceFile:
    """Rank 0 reads and writes it; the others learn what it holds."""

    def __init__(self, settings: Settings, dataset: Dataset, weights: str):
        """weights: a digest of them."""
        folder = dataset.preparation.basic.cache_dir or settings.training.save
        visuals = [dataset.files_digest(of_videos) for of_videos in (False, True)]
        self.of = {"weights": weights, "data": dataset.fingerprint(" ".join(visuals)), "dtype": settings.training.dtype}
        self.path = Path(folder) / f"reference-{hashlib.sha256(json.dumps(self.of).encode()).hexdigest()[:16]}.jsonl"

    def begin(self, layout: list[int]) -> tuple[Rows, int]:
        """-> what is there, and of how many micro-batches. layout: their number, ranks, and size.

        What was computed in another layout is begun anew, unless it is whole. CheckpointError.
        """
        found: list[Any] = [None]

        def read() -> None:
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            whole = [line for line in lines if line.endswith(b"\n")]  # one that was interrupted does not
            values = [self._parse(line, number) for number, line in enumerate(whole, 1)]
            header, done = values[0] if values else self.of, values[1:]
            there = header.pop("layout", layout)
            if header != self.of:
                raise CheckpointError(f"{self.path} is of other weights or data; move it away")
            if there != layout and len(done) < there[0]:
                logger.info(f"{self.path} was begun by {there[1]} ranks, and is computed anew")
                values, done = [], []
            if not values:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_bytes(b"")
                self.add(self.of | {"layout": layout})
            elif len(whole) < len(lines):
                with self.path.open("r+b") as file:
                    file.truncate(sum(map(len, whole)))
            found[0] = [row for rows in done for row in rows], layout[0] if len(done) == there[0] else len(done)

        run_sharing_errors(read if dist.get_rank() == 0 else lambda: None, None, f"{self.path} cannot be used")
        dist.broadcast_object_list(found)
        rows, count = found[0]
        return rows, count

    def _parse(self, line: bytes, number: int) -> Any:
        try:
            crc, text = json.loads(line)
            if checksum(text.encode()) == crc:
                return json.loads(text)
        except (ValueError, TypeError, AttributeError):
            pass
        raise CheckpointError(f"{self.path}: line {number} is damaged; remove the file, and it is computed again")

    def add(self, values: Any) -> None:
        text = json.dumps(values)
        with self.path.open("a") as file:
            file.write(json.dumps([checksum(text.encode()), text]) + "\n")
            file.flush()


def decoded(
    dataset: Dataset, settings: Settings, order: list[list[list[int]]], device: torch.device
) -> Iterable[PackedBatch | UserError]:
    """The micro-batches of an order as of `each_once`."""
    loader = settings.data.dataloader_param
    batches = DecodedBatches(dataset, loader.patch_bucket)
    return background_loader(batches, order, loader.num_workers, has_own_memory(device))


@torch.no_grad()
def forward(
    model: Qwen35, batches: Iterable[PackedBatch | UserError], meshes: Meshes, device: torch.device
) -> Iterator[tuple[PackedBatch, PackedBatch, Tensor]]:
    """-> each batch, this rank's part of it on the device, its log-probabilities [T/U]."""
    recompute = model.model.language_model.recompute
    model.recompute(False)
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        part, *_ = shard_batch(batch, batch.labels, None, meshes.ulysses_rank, meshes.ulysses_size)
        part = part.to(device)
        yield batch, part, model.log_probs(part)[0]
    reshard(model)
    model.recompute(recompute)


def add_reference(
    settings: Settings,
    dataset: Dataset,
    extra: Mapping[str, Any],
    model: Qwen35 | None,
    meshes: Meshes,
    device: torch.device,
    beat: Callable[[str], None],
) -> None:
    """Give a data set of pairs its `reference`: from the file, and what is missing by the model.

    extra: a checkpoint's, which says what the reference is. model: sharded, with its weights; None:
    they have been trained since, so all must be there. Raises CheckpointError, RecordError.
    """
    order = each_once(dataset, settings, meshes.data_rank, meshes.data_size)
    file = ReferenceFile(settings, dataset, extra[REFERENCE])
    rows, count = file.begin([len(order), meshes.data_size, settings.training.micro_batch_size])
    if count < len(order) and model is None:
        raise CheckpointError(
            f"{file.path} has the reference's log-probabilities of {count:,} of {len(order):,} micro-batches, and the weights "
            "have been trained since; compute them from where the run began: make logprobs, with the same settings"
        )
    if count < len(order) and model is not None:
        logger.info(f"computing the log-probabilities of the reference, which {file.path} keeps")
        batches = decoded(dataset, settings, order[count:], device)
        for number, (batch, part, log_probs) in enumerate(forward(model, batches, meshes, device), count + 1):
            beat(f"log-probabilities of the reference, micro-batch {number} of {len(order)}")
            if number * 10 // len(order) > (number - 1) * 10 // len(order):
                logger.info(f"log-probabilities of the reference: micro-batch {number:,} of {len(order):,}")
            assert batch.pair_numbers is not None
            both = answer_log_probs(part, log_probs, meshes)[0].tolist()
            own = [(n, *values) for n, values in zip(batch.pair_numbers.tolist(), both, strict=True)]
            parts: list[Rows] = [[]] * dist.get_world_size()
            dist.all_gather_object(parts, own if meshes.ulysses_rank == 0 else [])
            together = [row for part_rows in parts for row in part_rows]
            if dist.get_rank() == 0:
                file.add(together)
            rows += together
    dataset.reference = torch.full((dataset.units, 2), torch.nan)
    dataset.reference[[n for n, *_ in rows]] = torch.tensor([both for _, *both in rows]).view(-1, 2)
