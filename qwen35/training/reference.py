"""Log-probabilities of a data set's answers, computed once and kept in a file.

Above all those of pairs by the reference, which a run of all weights begins as: they are computed
before the first step, and kept in cache_dir, without one in the save folder. So no second model is
ever in memory.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwen35.batch import PackedBatch
from qwen35.checkpoint.dcp_write import run_sharing_errors
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.lock import take
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

# units of each packed sequence of a micro-batch, the batch, a rank's part, its log-probabilities ->
# the part's rows
RowsOf = Callable[[list[list[int]], PackedBatch, PackedBatch, Tensor], list[Any]]


class RowsFile:
    """What a line each says of a data set's micro-batches, behind a line on what made them.

    Rank 0 reads and writes it; the others learn what it holds. One that was interrupted goes on.
    """

    def __init__(self, path: Path, of: dict[str, Any]):
        """of: what they depend on."""
        self.path, self.of = path, of

    def begin(self, layout: list[int]) -> tuple[list[Any], int]:
        """-> the rows that are there, and of how many micro-batches. layout: their number, …

        What was begun in another layout is computed anew, unless it is whole. CheckpointError.
        """
        found: list[Any] = [None]

        def read() -> None:
            done, there, size = self._parsed(self.path.read_bytes() if self.path.exists() else b"", layout)
            if len(done) < there[0]:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("a+b")
                if take(fcntl.lockf, self.file.fileno(), fcntl.LOCK_EX) is False:
                    raise CheckpointError(f"{self.path}: another job is computing it; start this one once that is done")
                self.file.seek(0)
                done, there, size = self._parsed(self.file.read(), layout)
                if there != layout:
                    logger.info(f"{self.path} was begun in another layout, and is computed anew")
                    done, size = [], 0
                self.file.truncate(size)
                if not size:
                    self.add(self.of | {"layout": layout})
            found[0] = [row for rows in done for row in rows], layout[0] if len(done) == there[0] else len(done)

        run_sharing_errors(read if dist.get_rank() == 0 else lambda: None, None, f"{self.path} cannot be used")
        dist.broadcast_object_list(found)
        rows, count = found[0]
        return rows, count

    def _parsed(self, data: bytes, layout: list[int]) -> tuple[list[Any], list[int], int]:
        """-> the rows of its micro-batches, its layout, and the bytes of its whole lines."""
        lines = [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]  # not an interrupted one
        header, *done = [self._value(line, number) for number, line in enumerate(lines, 1)] or [dict(self.of)]
        there = header.pop("layout", layout)
        if header != self.of:
            raise CheckpointError(f"{self.path} is of another model or data; move it away")
        return done, there, sum(map(len, lines))

    def _value(self, line: bytes, number: int) -> Any:
        try:
            crc, text = json.loads(line)
            if checksum(text.encode()) == crc:
                return json.loads(text)
        except (ValueError, TypeError, AttributeError):
            pass
        raise CheckpointError(f"{self.path}: line {number} is damaged; remove the file, and it is computed again")

    def add(self, value: Any) -> None:
        text = json.dumps(value)
        self.file.write((json.dumps([checksum(text.encode()), text]) + "\n").encode())
        self.file.flush()


def made_with(settings: Settings, dataset: Dataset, weights: str) -> dict[str, Any]:
    """What log-probabilities depend on, beside the layout. weights: a digest of them."""
    preparation = dataset.preparation
    visuals = [dataset.files_digest(of_videos) for of_videos in (False, True)]
    pixels = [f and (f.mean, f.std, f.scale) for f in (preparation.images, preparation.videos)]
    model = asdict(load_config(settings.model.model_name_or_path))  # no weight shows a rope's base, say
    data = dataset.fingerprint(repr((visuals, pixels, model)))
    return {"weights": weights, "data": data, "dtype": settings.training.dtype}


def reference_file(settings: Settings, dataset: Dataset, weights: str) -> RowsFile:
    of = made_with(settings, dataset, weights)
    name = f"reference-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]}.jsonl"
    return RowsFile(Path(dataset.preparation.basic.cache_dir or settings.training.save, name), of)


@dataclass(frozen=True)
class Forward:
    """Log-probabilities by a sharded model, without gradients. Every rank calls the methods."""

    settings: Settings
    model: Qwen35
    meshes: Meshes
    device: torch.device
    beat: Callable[[str], object]

    @torch.no_grad()
    def rows(self, file: RowsFile, dataset: Dataset, rows_of: RowsOf, refusal: str = "") -> list[Any]:
        """Of all of a data set: what the file has, and the rest, which it then has too.

        Of ranks that share a batch the first one's rows count. refusal: why the model cannot
        compute them. Raises CheckpointError, RecordError.
        """
        t, loader, ulysses_rank = self.settings.training, self.settings.data.dataloader_param, self.meshes.ulysses_rank
        order = each_once(dataset, self.settings, self.meshes.data_rank, self.meshes.data_size)
        cutoff_len = dataset.preparation.basic.cutoff_len
        rows, count = file.begin([len(order), self.meshes.data_size, t.micro_batch_size, cutoff_len])
        if count == len(order):
            logger.info(f"log-probabilities from {file.path}")
            return rows
        if refusal:
            raise CheckpointError(f"{file.path} has {count:,} of {len(order):,} micro-batches, and {refusal}")
        logger.info(f"computing log-probabilities, which {file.path} keeps")
        decoding, is_pinned = DecodedBatches(dataset, loader.patch_bucket), has_own_memory(self.device)
        batches = background_loader(decoding, order[count:], loader.num_workers, is_pinned)
        recompute = self.model.model.language_model.recompute
        self.model.recompute(False)
        for number, (units, batch) in enumerate(zip(order[count:], batches, strict=True), count + 1):
            if isinstance(batch, UserError):
                raise batch
            self.beat(f"log-probabilities, micro-batch {number} of {len(order)}")
            part, *_ = shard_batch(batch, batch.labels, None, ulysses_rank, self.meshes.ulysses_size)
            part = part.to(self.device)
            own = rows_of(units, batch, part, self.model.log_probs(part)[0])
            parts: list[list[Any]] = [[]] * dist.get_world_size()
            dist.all_gather_object(parts, own if ulysses_rank == 0 else [])
            found = [row for part in parts for row in part]
            if dist.get_rank() == 0:
                file.add(found)
            if number % 100 == 0:
                logger.info(f"log-probabilities: micro-batch {number:,} of {len(order):,}")
            rows += found
        reshard(self.model)
        self.model.recompute(recompute)
        return rows

    def add_reference(self, dataset: Dataset, weights: str, is_trained: bool = False) -> None:
        """Give a data set of pairs its `reference`: from the file, what is missing by the model.

        weights: a digest of the reference's. is_trained: the model's are no longer these, so all
        must be there. Raises CheckpointError, RecordError.
        """

        def rows_of(units: list[list[int]], batch: PackedBatch, part: PackedBatch, log_probs: Tensor) -> list[Any]:
            assert batch.pair_numbers is not None
            both = answer_log_probs(part, log_probs, self.meshes)[0].tolist()
            return [(number, *values) for number, values in zip(batch.pair_numbers.tolist(), both, strict=True)]

        lost = (
            "the weights have been trained since; compute it from where the run began: make logprobs, with its settings"
        )
        file = reference_file(self.settings, dataset, weights)
        rows = self.rows(file, dataset, rows_of, lost * is_trained)
        dataset.reference = torch.full((dataset.units, 2), torch.nan)
        dataset.reference[[number for number, *_ in rows]] = torch.tensor([both for _, *both in rows]).view(-1, 2)
