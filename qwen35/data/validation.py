"""The validation set: the same micro-batches each time, as many on each rank, each sample once."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen35.batch import PackedBatch
from qwen35.config.schema import DatasetFile, DatasetParam, Settings, dataset_entries
from qwen35.data.background import background_loader
from qwen35.data.dataloader import DecodedBatches, open_dataset
from qwen35.data.dataset import Dataset
from qwen35.data.mixture import dataset_files
from qwen35.data.packing import pack_epoch
from qwen35.data.record import Record
from qwen35.data.tokenized import Progress, silent, tokenised
from qwen35.errors import UserError


class ValidationSet:
    """Iterates over the PackedBatches of a rank; `len` is the same on all ranks.

    The last micro-batches are filled up with packed sequences of pad tokens alone.
    Raises SettingError, and RecordError for an unusable record (while iterating: a damaged image).
    """

    def __init__(
        self,
        settings: Settings,
        rank: int,
        world_size: int,
        progress: Progress = silent,
        pin: bool = False,
        training_data: DatasetParam | None = None,
    ):
        """settings: those of `Settings.validation`. training_data: what is trained on."""
        loader, basic = settings.data.dataloader_param, settings.data.dataset_param.basic_parameters
        self.dataset = open_dataset(settings, progress, training_data.attr if training_data else None)
        others = training_data.basic_parameters.dataset if training_data else None
        self.training_overlap = _common_files(basic.dataset, others) if others is not None else []
        self.micro_batch_tokens = settings.training.micro_batch_size * basic.cutoff_len
        self._order = each_once(self.dataset, settings, rank, world_size)
        self._loader = background_loader(
            DecodedBatches(self.dataset, loader.patch_bucket), self._order, loader.num_workers, pin, persistent=True
        )
        self._next: Iterator[PackedBatch | UserError] | None = None
        self.masked = 0  # records that are not asked, as no last answer of theirs is right
        self.fingerprint = self.dataset.fingerprint(f"{basic.cutoff_len}")

    def __len__(self) -> int:
        return len(self._order)

    def also_trained(self, trained: Dataset) -> list[str]:
        """The sources of its samples that `trained` has too, by tokens, images and videos.

        Those of files in `training_overlap` are not among them.
        """
        own = list(self.dataset.hashes(but={str(file) for file in self.training_overlap}))
        found = {key for key, _ in own} & {key for key, _ in trained.hashes()}
        return [source for key, source in own if key in found]

    def start(self) -> None:
        """Start decoding. Call it before other threads run, because the workers are forked."""
        self._next = iter(self._loader)

    def close(self) -> None:
        """End the workers; nothing can be iterated any more."""
        self._next = None
        del self._loader

    def __iter__(self) -> Iterator[PackedBatch]:
        for batch in self._next or iter(self._loader):
            if isinstance(batch, UserError):
                raise batch
            yield batch
        self.start()

    def records_for_generation(self, progress: Progress = silent) -> list[list[Record]]:
        """The records of at most cutoff_len tokens, in groups of at most a micro-batch's tokens.

        Not those whose last answer is no right one, as their loss mask says.

        Raises RecordError.
        """
        preparation = self.dataset.preparation
        skip = (lambda error: progress(str(error), 1)) if self.dataset.skips_bad_records else None
        groups: list[list[Record]] = []
        self.masked = room = 0
        entries = map(preparation.of_file, dataset_entries(preparation.basic.dataset))
        for file, of_file in zip(self.dataset.files, entries, strict=False):
            for record, parts in tokenised(Path(file.file), of_file, file.records, skip):
                progress(record.source, 1)
                length = max(len(sample.ids) for _, sample in parts)
                if length > preparation.basic.cutoff_len:
                    continue
                if not record.has_right_answer:
                    self.masked += 1
                    continue
                if length > room:
                    groups.append([])
                    room = self.micro_batch_tokens
                groups[-1].append(record)
                room -= length
        return groups


def each_once(dataset: Dataset, settings: Settings, rank: int, world_size: int) -> list[list[list[int]]]:
    """A rank's micro-batches, as many as any other's, which together have each sample once."""
    size = settings.training.micro_batch_size
    packed = pack_epoch(dataset.lengths, dataset.preparation.basic.cutoff_len, 0, 0, shuffle=False)
    micro_batches = [packed[i : i + size] for i in range(0, len(packed), size)]
    micro_batches[-1] += [[]] * (size - len(micro_batches[-1]))
    micro_batches += [[[]] * size] * (-len(micro_batches) % world_size)
    return micro_batches[rank::world_size]


def _common_files(dataset: str | Sequence[DatasetFile], other: str | Sequence[DatasetFile]) -> list[Path]:
    """The files of `dataset` that are also, by whatever name, in `other`."""
    others = {file.resolve() for file in dataset_files(other)}
    return [file for file in dataset_files(dataset) if file.resolve() in others]
