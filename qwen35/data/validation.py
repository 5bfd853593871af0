"""The validation set: the same micro-batches each time, as many for each rank, in which every sample is once."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen35.batch import PackedBatch
from qwen35.config.schema import DatasetFile, DatasetParam, Settings
from qwen35.data.dataloader import DecodedBatches, in_background, open_dataset
from qwen35.data.mixture import dataset_files
from qwen35.data.packing import pack_epoch
from qwen35.data.record import Record
from qwen35.data.tokenized import Progress, tokenised, untold
from qwen35.errors import UserError


class ValidationSet:
    """Iterates over PackedBatch, those of `rank`: `len` of them, whatever the rank. Where the bins do not come out even, the
    last ones are of pad tokens alone.

    Raises SettingError, and RecordError for a record that cannot be used (while iterating: for a damaged image).
    """

    def __init__(
        self,
        settings: Settings,
        rank: int,
        world_size: int,
        progress: Progress = untold,
        pin: bool = False,
        trained: DatasetParam | None = None,
    ):
        """settings: those of the validation, `Settings.validation`; trained: of the records that are trained on."""
        loader, basic = settings.data.dataloader_param, settings.data.dataset_param.basic_parameters
        self.dataset = open_dataset(settings, progress, trained.attr if trained else None)
        self.also_trained = _in_both(basic.dataset, trained.basic_parameters.dataset) if trained else []
        self.micro_batch = settings.training.micro_batch_size * basic.cutoff_len  # tokens
        bins = pack_epoch(self.dataset.lengths, basic.cutoff_len, 0, 0, shuffle=False)
        size = settings.training.micro_batch_size
        micro_batches = [bins[i : i + size] for i in range(0, len(bins), size)]
        micro_batches[-1] += [[]] * (size - len(micro_batches[-1]))
        micro_batches += [[[]] * size] * (-len(micro_batches) % world_size)
        self._order = micro_batches[rank::world_size]
        self._loader = in_background(
            DecodedBatches(self.dataset, loader.patch_bucket), self._order, loader.num_workers, pin, again=True
        )
        self._next: Iterator[PackedBatch | UserError] | None = None
        self.fingerprint = self.dataset.fingerprint(f"{basic.cutoff_len}")

    def __len__(self) -> int:
        return len(self._order)

    def start(self) -> None:
        """Have the first batches decoded: before other threads run, for the workers are forked."""
        self._next = iter(self._loader)

    def close(self) -> None:
        """End its workers; it has no more batches then."""
        self._next = None
        del self._loader

    def __iter__(self) -> Iterator[PackedBatch]:
        for batch in self._next or iter(self._loader):
            if isinstance(batch, UserError):
                raise batch
            yield batch
        self.start()

    def answerable(self, progress: Progress = untold) -> list[list[Record]]:
        """The records that are no longer than cutoff_len, in groups of at most a micro-batch's tokens.

        Raises RecordError.
        """
        preparation = self.dataset.preparation
        skip = (lambda error: progress(str(error), 1)) if self.dataset.skips else None
        groups: list[list[Record]] = []
        room = 0
        for file in self.dataset.files:
            for record, sample in tokenised(Path(file.file), preparation, file.records, skip):
                progress(record.source, 1)
                length = len(sample.ids)
                if length > preparation.basic.cutoff_len:
                    continue
                if length > room:
                    groups.append([])
                    room = self.micro_batch
                groups[-1].append(record)
                room -= length
        return groups


def _in_both(dataset: str | Sequence[DatasetFile], other: str | Sequence[DatasetFile]) -> list[Path]:
    """The files of `dataset` that are, by whatever name, of the other too."""
    others = {file.resolve() for file in dataset_files(other)}
    return [file for file in dataset_files(dataset) if file.resolve() in others]
