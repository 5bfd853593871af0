"""All samples of a run: tokens and lengths known from the start, pixels decoded when asked for."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen35.batch import IGNORE, VisionSpec
from qwen35.data.formats import RecordError, dataset_files
from qwen35.data.images import ImageError
from qwen35.data.positions import position_ids
from qwen35.data.samples import FileSamples, Preparation, load_samples


@dataclass(frozen=True)
class Sample:
    """One sequence, ready to be packed."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, already shifted; the last is -100
    position_ids: Tensor  # [3, T] int64
    pixel_values: Tensor  # [P, 3*2*16*16] fp32
    grid_thw: Tensor  # [N, 3] int64


class Dataset:
    """The samples of all files in order, `max_samples` of the whole.

    Raises SettingError for files that are not there, RecordError for a record that cannot be used, has nothing trained or
    is longer than cutoff_len: a sample is never cut.
    """

    def __init__(self, preparation: Preparation, spec: VisionSpec, progress: bool = False):
        basic = preparation.basic
        self.preparation, self.spec = preparation, spec
        self.files: list[FileSamples] = []
        left = basic.max_samples
        for file in dataset_files(basic.dataset):
            if left == 0:
                break
            samples = load_samples(file, preparation, left, progress)
            self.files.append(samples)
            left = None if left is None else left - len(samples.sources)
        self.lengths = np.concatenate([samples.offsets.diff().numpy() for samples in self.files])  # [N] tokens
        self._starts = np.cumsum([0, *[len(samples.sources) for samples in self.files]])
        if len(self.lengths) == 0:
            raise RecordError(f"{basic.dataset}: no records")
        too_long = np.flatnonzero(self.lengths > basic.cutoff_len)
        if len(too_long):
            first = int(too_long[0])
            others = f" ({len(too_long)} such records in all)" if len(too_long) > 1 else ""
            raise RecordError(
                f"{self.source(first)}: {self.lengths[first]} tokens, more than "
                f"data.dataset_param.basic_parameters.cutoff_len = {basic.cutoff_len}{others}"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def trained_tokens(self) -> int:
        return sum(int(samples.trained.sum()) for samples in self.files)

    @property
    def images(self) -> int:
        return sum(len(samples.images) for samples in self.files)

    def fingerprint(self, more: str = "") -> str:
        """Changes with any sample's tokens, with which of them are trained, and with `more`."""
        digest = hashlib.blake2b(more.encode(), digest_size=16)
        for samples in self.files:
            for tensor in (samples.ids, samples.trained, samples.offsets):
                digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def _locate(self, index: int) -> tuple[FileSamples, int]:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.files[file], index - int(self._starts[file])

    def source(self, index: int) -> str:
        samples, i = self._locate(index)
        return samples.sources[i]

    def __getitem__(self, index: int) -> Sample:
        """Decodes the images. Raises RecordError if one cannot be decoded or is not the one that was measured."""
        samples, i = self._locate(index)
        start, end = samples.offsets[i : i + 2].tolist()
        first, last = samples.image_offsets[i : i + 2].tolist()
        ids = samples.ids[start:end]
        grids = samples.grids[first:last]
        processor = self.preparation.images
        pixels = [torch.zeros(0, processor.values)]
        for path, grid in zip(samples.images[first:last], grids.tolist(), strict=True):
            try:
                patches, found = processor.patches(path)
            except ImageError as error:
                raise RecordError(f"{samples.sources[i]}: {path}: {error}") from None
            if list(found) != grid:
                raise RecordError(f"{samples.sources[i]}: {path}: has changed since it was measured; empty cache_dir")
            pixels.append(patches)
        return Sample(
            ids.long(),
            shifted_labels(ids, samples.trained[start:end]),
            torch.from_numpy(position_ids(ids.numpy(), grids.tolist(), self.spec)),
            torch.cat(pixels),
            grids,
        )


def shifted_labels(ids: Tensor, trained: Tensor) -> Tensor:
    """ids [T], trained [T] bool -> labels [T] int64: the next token where that is trained, else -100."""
    labels = torch.full((len(ids),), IGNORE, dtype=torch.int64)
    labels[:-1] = torch.where(trained[1:], ids[1:].long(), IGNORE)
    return labels
