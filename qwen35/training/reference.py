"""Log-probabilities of a data set's answers by the reference, which a run of all weights begins as.

They are computed once, before the first step, and kept in a file in cache_dir, without one in the
save folder: so no second model is ever in memory. Its name is a digest of weights, config.json,
data and dtype. Its first line says for what it is, each further one holds a micro-batch of all
ranks: one that was interrupted goes on there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from qwen35.model import Qwen35, load_config
from qwen35.parallel.context_parallel import shard_batch
from qwen35.parallel.fsdp import reshard
from qwen35.parallel.mesh import Meshes
from qwen35.training.dpo import answer_log_probs

Jobs = list[list[list[int]]]  # the units of each packed sequence of each micro-batch
RowsOf = Callable[[list[list[int]], PackedBatch, PackedBatch, Tensor], list[Any]]
Rows = list[tuple[int, float, float]]  # a pair's number, log-probabilities of its chosen and rejected answers


class ReferenceFile:
    """Rank 0 reads and writes it; the others learn what it holds."""

    def __init__(self, settings: Settings, dataset: Dataset, weights: str):
        """weights: a digest of them."""
        preparation = dataset.preparation
        folder = preparation.basic.cache_dir or settings.training.save
        visuals = [dataset.files_digest(of_videos) for of_videos in (False, True)]
        pixels = [f and (f.mean, f.std, f.scale) for f in (preparation.images, preparation.videos)]
        model = asdict(load_config(settings.model.model_name_or_path))  # no weight shows a rope's base, say
        data = dataset.fingerprint(repr((visuals, pixels, model)))
        self.of = {"weights": weights, "data": data, "dtype": settings.training.dtype}
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
            header: dict[str, Any] = values[0] if values else dict(self.of)
            done = values[1:]
            there = header.pop("layout", layout)
            if header != self.of:
                raise CheckpointError(f"{self.path} is of another model or data; move it away")
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


@dataclass(frozen=True)
class Forward:
    """Log-probabilities by a sharded model, without gradients. Every rank calls the methods."""

    settings: Settings
    model: Qwen35
    meshes: Meshes
    device: torch.device
    beat: Callable[[str], object]

    @torch.no_grad()
    def by_round(self, dataset: Dataset, order: Jobs, rows_of: RowsOf) -> Iterator[list[Any]]:
        """What rows_of makes of each micro-batch of an order as of `each_once`, of all ranks.

        It gets the units of a micro-batch, the batch, this rank's part of it on the device, and the
        log-probabilities of the part's labels. Of ranks that share a batch the first counts.
        """
        loader, ulysses_rank = self.settings.data.dataloader_param, self.meshes.ulysses_rank
        decoding = DecodedBatches(dataset, loader.patch_bucket)
        batches = background_loader(decoding, order, loader.num_workers, has_own_memory(self.device))
        recompute = self.model.model.language_model.recompute
        self.model.recompute(False)
        for number, (units, batch) in enumerate(zip(order, batches, strict=True), 1):
            if isinstance(batch, UserError):
                raise batch
            self.beat(f"log-probabilities, micro-batch {number} of {len(order)}")
            part, *_ = shard_batch(batch, batch.labels, None, ulysses_rank, self.meshes.ulysses_size)
            part = part.to(self.device)
            own = rows_of(units, batch, part, self.model.log_probs(part)[0])
            parts: list[list[Any]] = [[]] * dist.get_world_size()
            dist.all_gather_object(parts, own if ulysses_rank == 0 else [])
            if number % 100 == 0:
                logger.info(f"log-probabilities: micro-batch {number:,} of {len(order):,}")
            yield [row for rows in parts for row in rows]
        reshard(self.model)
        self.model.recompute(recompute)

    def add_reference(self, dataset: Dataset, weights: str, is_trained: bool = False) -> None:
        """Give a data set of pairs its `reference`: from the file, what is missing by the model.

        weights: a digest of the reference's. is_trained: the model's are no longer these, so all
        must be there. Raises CheckpointError, RecordError.
        """

        def rows_of(units: list[list[int]], batch: PackedBatch, part: PackedBatch, log_probs: Tensor) -> Rows:
            assert batch.pair_numbers is not None
            both = answer_log_probs(part, log_probs, self.meshes)[0].tolist()
            return [(number, *values) for number, values in zip(batch.pair_numbers.tolist(), both, strict=True)]

        order = each_once(dataset, self.settings, self.meshes.data_rank, self.meshes.data_size)
        file = ReferenceFile(self.settings, dataset, weights)
        rows, count = file.begin([len(order), self.meshes.data_size, self.settings.training.micro_batch_size])
        if count < len(order) and is_trained:
            raise CheckpointError(
                f"{file.path} has the reference's log-probabilities of {count:,} of {len(order):,} micro-batches, and the "
                "weights have been trained since; compute them from where the run began: make logprobs, with its settings"
            )
        if count < len(order):
            logger.info(f"computing the log-probabilities of the reference, which {file.path} keeps")
        for found in self.by_round(dataset, order[count:], rows_of) if count < len(order) else ():
            if dist.get_rank() == 0:
                file.add(found)
            rows += found
        dataset.reference = torch.full((dataset.units, 2), torch.nan)
        dataset.reference[[number for number, *_ in rows]] = torch.tensor([both for _, *both in rows]).view(-1, 2)
