"""Which samples an epoch holds, where files have weights: a function of seed and epoch alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen35.config.schema import DatasetFile, dataset_entries
from qwen35.errors import SettingError

SETTING = "data.dataset_param.basic_parameters.dataset"


def dataset_files(dataset: str | Sequence[DatasetFile]) -> list[Path]:
    """The files of `dataset`, as given or below the working folder. Raises SettingError if one is missing."""
    files = [Path(entry.file) for entry in dataset_entries(dataset)]
    if not files:
        raise SettingError(f"{SETTING} names no file")
    for file in files:
        if file.is_dir():
            raise SettingError(f"{SETTING}: {file}: is a folder; name the files in it, with commas between them")
        if file.exists() and not file.is_file():
            raise SettingError(f"{SETTING}: {file}: is a pipe or a device; write its records to a file first")
        if not file.is_file():
            raise SettingError(f"{SETTING}: {file}: no such file below {Path.cwd()}")
    return files


def dataset_name(dataset: str | Sequence[DatasetFile]) -> str:
    """For messages."""
    return ",".join(entry.file for entry in dataset_entries(dataset))


@dataclass(frozen=True)
class Mixture:
    """Files of so many samples each, numbered through, with their weights.

    The samples of a file form an endless row of passes over all of it, each in an order of its own; an epoch takes the next
    weight * size of the row. So a weight of 2 shows each sample twice an epoch, 0.5 the one half in one epoch and the other
    half in the next, and no sample is ever more than one pass ahead of another.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shuffle: bool = True

    def epoch(self, epoch: int) -> np.ndarray:
        """[n] int64 numbers of the samples, those of a file together."""
        starts = np.cumsum([0, *self.sizes])
        parts = [start + self._of_file(file, epoch) for file, start in enumerate(starts[:-1].tolist())]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _of_file(self, file: int, epoch: int) -> np.ndarray:
        size, weight = self.sizes[file], self.weights[file]
        if weight == 1 or size == 0:
            return np.arange(size)
        first, last = (round(size * weight * number) for number in (epoch, epoch + 1))
        passes = [self._pass(file, number) for number in range(first // size, -(-last // size))]
        row = np.concatenate(passes) if passes else np.zeros(0, dtype=np.int64)
        return np.sort(row[first - first // size * size :][: last - first])

    def _pass(self, file: int, number: int) -> np.ndarray:
        size = self.sizes[file]
        return np.random.default_rng([self.seed, file, number]).permutation(size) if self.shuffle else np.arange(size)
