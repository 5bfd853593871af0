"""Which files are read, and how often each sample comes in an epoch if the files have weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen35.config.schema import DatasetFile, dataset_entries
from qwen35.errors import SettingError

SETTING = "data.dataset_param.basic_parameters.dataset"


def dataset_files(dataset: str | Sequence[DatasetFile]) -> list[Path]:
    """The files of `dataset`; relative names are below the working folder. Raises SettingError."""
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
    """The files' names, for messages."""
    return ",".join(entry.file for entry in dataset_entries(dataset))


@dataclass(frozen=True)
class Mixture:
    """Weighted files: which samples an epoch holds, as a function of seed and epoch alone.

    The samples of a file form an endless series of passes over it, each in another order; an epoch
    takes the next weight * size of them. So a weight of 2 shows each sample twice an epoch, 0.5 one
    half in an epoch and the other half in the next; no sample is ever more than one pass ahead.
    """

    sizes: tuple[int, ...]  # samples of each file; those of all files are numbered through
    weights: tuple[float, ...]
    seed: int
    shuffle: bool = True

    def epoch(self, epoch: int) -> np.ndarray:
        """[n] int64: the samples of an epoch, file by file, those of a file in ascending order."""
        starts = np.cumsum([0, *self.sizes])
        parts = [start + self._file_epoch(file, epoch) for file, start in enumerate(starts[:-1].tolist())]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _file_epoch(self, file: int, epoch: int) -> np.ndarray:
        size, weight = self.sizes[file], self.weights[file]
        if weight == 1 or size == 0:
            return np.arange(size)
        first, last = (round(size * weight * number) for number in (epoch, epoch + 1))
        passes = [self._pass(file, number) for number in range(first // size, -(-last // size))]
        series = np.concatenate(passes) if passes else np.zeros(0, dtype=np.int64)
        return np.sort(series[first - first // size * size :][: last - first])

    def _pass(self, file: int, number: int) -> np.ndarray:
        size = self.sizes[file]
        return np.random.default_rng([self.seed, file, number]).permutation(size) if self.shuffle else np.arange(size)
