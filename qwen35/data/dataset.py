"""All samples of a run: tokens and lengths are known from the start, pixels are decoded on access.

Which samples share a packed sequence, and in which order they come, is packing.py's business.
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qwen35.batch import IGNORE, VisionSpec
from qwen35.config.schema import Attr, dataset_entries
from qwen35.data.data_warnings import DataWarnings, Skipped
from qwen35.data.image_processor import ImageError
from qwen35.data.mixture import SETTING, dataset_files, dataset_name
from qwen35.data.mrope import position_ids
from qwen35.data.preparation import Preparation
from qwen35.data.record import RecordError, Video
from qwen35.data.samples import FileSamples
from qwen35.data.tokenized import Progress, load_files, paths_of, silent, visual_from_json
from qwen35.data.truncation import truncate
from qwen35.errors import SettingError
from qwen35.wording import number_of, number_of_visuals

Decoded = tuple[Tensor, tuple[int, int, int], Any]  # patches of an image or video, its grid, a video's seconds
EMBEDDED = re.compile("[0-9a-f]{64}")  # the name of an embedded image in cache_dir


@dataclass(frozen=True)
class Sample:
    """One sequence, ready to be packed."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, already shifted; the last is -100
    position_ids: Tensor  # [3, T] int64
    pixel_values: Tensor  # [P, 3*2*16*16] fp32
    grid_thw: Tensor  # [N, 3] int64
    pair: int | None = None  # the number of the pair whose side it is


@dataclass
class Truncated:
    """Which samples `truncation: truncate` has shortened, and how much they lost in all."""

    numbers: list[int] = field(default_factory=list)  # of the samples, as in Dataset
    tokens: int = 0
    images: int = 0
    videos: int = 0


class Dataset:
    """The samples of all files in order, of their first `max_samples` records.

    Raises SettingError for a missing file, and RecordError for a record that cannot be used, has no
    trained token or is longer than cutoff_len. With `on_bad_record: skip` such records are left out
    and counted in `skipped`; it is an error only if none remains. For those that are too long,
    `truncation` comes first.

    Raises SettingError for a field named in attr that no record has, unless `training_attr` names
    the same one. If max_samples ends the reading, that is one of `warnings` instead.

    A sample has a number among all, and an index among those that are not left out. What is packed,
    or left out, is a sample alone, or of preference pairs two neighbours: a unit.
    """

    def __init__(
        self,
        preparation: Preparation,
        spec: VisionSpec | None,
        progress: Progress = silent,
        training_attr: Attr | None = None,
    ):
        basic = preparation.basic
        self.preparation, self.spec = preparation, spec
        self.width, self.unit = 2 if preparation.pairs else 1, preparation.unit  # samples of a unit, and its name
        self.skips_bad_records = basic.on_bad_record == "skip"
        self.reference: Tensor | None = None  # [pairs, 2] their log-probabilities by the reference, NaN: none
        self.files: list[FileSamples] = []
        for samples in load_files(preparation, progress):
            if not samples.records:
                raise RecordError(f"{samples.file}: no records")
            self.files.append(samples)
        self._starts = np.cumsum([0, *[len(samples.sources) for samples in self.files]])
        self.records = sum(samples.records for samples in self.files)
        self.skipped = Skipped()
        for samples in self.files:
            self.skipped.update(samples.skipped)
        self.warnings = self._warnings(training_attr, is_partial=self.records == basic.max_samples)
        self._tokens = np.concatenate([samples.offsets.diff().numpy() for samples in self.files])  # 0: left out
        self._visuals = np.concatenate([samples.image_offsets.diff().numpy() for samples in self.files])
        self._videos = sum(samples.visuals.objects() for samples in self.files)
        self.truncated = Truncated()
        self.units = len(self._tokens) // self.width  # also those that are left out now
        too_long = np.flatnonzero(self._of_units(self._tokens) > basic.cutoff_len).tolist()
        for unit in too_long:
            self._shorten(unit * self.width, len(too_long))
        self._kept = np.flatnonzero(self._tokens)  # [N * width]: index -> number
        self.sample_lengths = self._tokens[self._kept]  # [N * width] tokens
        self.lengths = self._of_units(self.sample_lengths)  # [N] tokens
        self.sizes = (np.diff(np.searchsorted(self._kept, self._starts)) // self.width).tolist()  # units of each file
        if len(self.lengths) == 0:
            why = f": all {self.records:,} are skipped, {self.skipped}" if len(self.skipped) else ""
            raise RecordError(f"{dataset_name(basic.dataset)}: no records{why}")

    def _warnings(self, training_attr: Attr | None, is_partial: bool) -> list[str]:
        """For the start of a run. is_partial: not all records were read. Raises SettingError."""
        dataset = self.preparation.basic.dataset
        warnings, missing = DataWarnings.expecting(self.preparation.names), list[str]()
        for number, (samples, entry) in enumerate(zip(self.files, dataset_entries(dataset), strict=False)):
            found = samples.warnings
            if entry.attr:  # it is not the other files' business
                missing += [
                    found.missing_name(name, samples.file, f"{SETTING}[{number}].attr") for name in found.unseen
                ]
                found = replace(found, unseen=warnings.unseen, fields={})
            warnings.update(found)
        files = dataset_files(dataset)
        unread, twice = files[len(self.files) :], [f for i, f in enumerate(files) if any(map(f.samefile, files[:i]))]
        lines = [f"{file} is listed more than once, and so are its records in each epoch" for file in twice]
        lines += [f"nothing of {file} is read: max_samples ends before it" for file in unread]
        if is_partial and training_attr:  # a validation's, which may be that of the training
            lines.append(f"max_samples: no record after the first {self.records:,} is read")
        lines += warnings.lines()
        read = f"the first {number_of(self.records, 'record')}" if is_partial else dataset_name(dataset)
        for setting, name in warnings.unseen.items():
            if training_attr is None or name != getattr(training_attr, setting):
                missing.append(warnings.missing_name(setting, read))
        if missing and not is_partial:
            raise SettingError(missing[0])
        return lines + missing

    def left_out(self) -> list[str]:
        """What of its records is not trained, a line each."""
        records, samples = self.records, len(self.skipped) + len(self)
        what = f"{records:,} records" if records == samples else f"{samples:,} samples of {records:,} records"
        lines = [f"skipped {len(self.skipped):,} of {what}: {self.skipped}"] if len(self.skipped) else []
        cut = self.truncated
        if cut.numbers:
            lines.append(
                f"cut {number_of(len(cut.numbers), 'sample')} to cutoff_len, {number_of(cut.tokens, 'token')} and "
                f"{number_of_visuals(cut.images, cut.videos)} of theirs are not trained"
            )
        return lines

    def _of_units(self, of_samples: np.ndarray) -> np.ndarray:
        """[N * width] -> [N]: the sums."""
        sums: np.ndarray = of_samples.reshape(-1, self.width).sum(1)
        return sums

    def _shorten(self, number: int, count: int) -> None:
        """Truncate or drop one of `count` units that are too long. Raises RecordError.

        number: of its first sample. Pairs are never truncated.
        """
        unit = slice(number, number + self.width)
        basic, tokens = self.preparation.basic, int(self._tokens[unit].sum())
        limit = f"data.dataset_param.basic_parameters.cutoff_len = {basic.cutoff_len}"
        what, cuts = (" of both answers, each with the prompt", "") if self.width > 1 else ("", ", truncate cuts them")
        message = f"{self._unit_source(number)}: {tokens} tokens{what}, more than {limit}"
        if basic.truncation == "error" and not self.skips_bad_records:
            others = f" ({count} such records in all)" if count > 1 else ""
            raise RecordError(f"{message}{others}; truncation: drop leaves such records out{cuts}")
        left, kind, visuals = 0, "longer than cutoff_len", int(self._visuals[unit].sum())
        self._visuals[unit] = 0
        if basic.truncation == "truncate":
            ids, mask, grids = (self._part(number, name, full=True).numpy() for name in ("ids", "loss_mask", "grids"))
            left, self._visuals[number] = truncate(ids, mask, grids, basic.cutoff_len, self.preparation.tokenizer)
            message, kind = f"{message}, and nothing trained is left of it", "nothing trained within cutoff_len"
        self._tokens[unit] = left
        lost = visuals - int(self._visuals[number])
        samples, i = self._locate(number)
        end = int(samples.image_offsets[i + self.width])
        videos = samples.visuals.objects(end - lost, end)
        self._videos -= videos
        if left:
            self.truncated.numbers.append(number)
            self.truncated.tokens += tokens - left
            self.truncated.images += lost - videos
            self.truncated.videos += videos
        else:
            self.skipped.add(RecordError(message, kind))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def label_tokens(self) -> np.ndarray:
        """[N] number of tokens of each unit that are in its loss mask."""
        counts = [
            np.add.reduceat(samples.loss_mask.numpy(), samples.offsets[:-1].numpy(), dtype=np.int64)
            for samples in self.files
            if len(samples.sources)
        ]
        by_number = np.concatenate(counts)
        for number in self.truncated.numbers:
            by_number[number] = int(self._part(number, "loss_mask").sum())
        return self._of_units(by_number[self._kept])

    @property
    def images(self) -> int:
        """Those that both answers of a pair have count once."""
        return -(-(int(self._visuals.sum()) - self._videos) // self.width)

    @property
    def videos(self) -> int:
        return -(-self._videos // self.width)

    def new_tokens(self) -> list[str]:
        """The tokens that somebody added to the family's own, of those that the samples have."""
        if not (names := self.preparation.tokenizer.new_tokens):
            return []
        found = [ids[np.isin(ids, [*names])] for ids in (samples.ids.numpy() for samples in self.files)]
        return [names[number] for number in np.unique(np.concatenate(found)).tolist()]

    def hashes(self, but: Collection[str] = ()) -> Iterator[tuple[int, str]]:
        """Of each unit: a hash of its tokens and visuals, for this process, and its source.

        but: files to leave out.
        """
        for samples, start in zip(self.files, self._starts.tolist(), strict=False):
            ids, offsets, visuals = samples.ids.numpy(), samples.offsets.tolist(), samples.image_offsets.tolist()
            for i in range(0, len(samples.sources), self.width):
                if self._tokens[start + i] and samples.file not in but:
                    end = i + self.width
                    shown = repr(samples.visuals[visuals[i] : visuals[end]])
                    yield hash((ids[offsets[i] : offsets[end]].tobytes(), shown)), self._unit_source(start + i)

    def fingerprint(self, more: str = "") -> str:
        """A hash of all tokens and loss masks, of where samples are truncated, and of `more`."""
        digest = hashlib.blake2b(more.encode(), digest_size=16)
        for samples in self.files:
            for tensor in (samples.ids, samples.loss_mask, samples.offsets):
                digest.update(tensor.numpy().data)
        if self.truncated.numbers:
            digest.update(self._tokens.tobytes())
        if self.width > 1:
            digest.update(self.unit.encode())
        return digest.hexdigest()

    def files_digest(self, of_videos: bool) -> str:
        """A hash of the names of all images, or videos, below dataset_dir, which no token shows.

        Of an embedded image, which lies in cache_dir, it covers the name alone, a digest of it.
        """
        root, digest = os.path.realpath(self.preparation.basic.dataset_dir) + os.sep, hashlib.blake2b(digest_size=16)
        for value in chain.from_iterable(samples.visuals for samples in self.files):
            if isinstance(value, str) == of_videos:
                continue
            for path in paths_of(visual_from_json(value)):
                name = path.name if EMBEDDED.fullmatch(path.name) else str(path).removeprefix(root)
                digest.update(f"{name}\0".encode(errors="surrogateescape"))
            digest.update(b"\n")
        return digest.hexdigest()

    def _locate(self, number: int) -> tuple[FileSamples, int]:
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.files[file], number - int(self._starts[file])

    def _part(self, number: int, name: Literal["ids", "loss_mask", "grids"], full: bool = False) -> Tensor:
        """A sample's slice of `FileSamples.<name>`: truncated, or `full`, as it was before."""
        samples, i = self._locate(number)
        offsets, counts = (samples.image_offsets, self._visuals) if name == "grids" else (samples.offsets, self._tokens)
        start = int(offsets[i])
        end = int(offsets[i + 1]) if full else start + int(counts[number])
        part: Tensor = getattr(samples, name)[start:end]
        return part

    def _source(self, number: int) -> str:
        samples, i = self._locate(number)
        return samples.sources[i]

    def _unit_source(self, number: int) -> str:
        """number: of its first sample, which of a pair is the chosen one."""
        return self._source(number).removesuffix(", chosen" if self.width > 1 else "")

    def samples_of(self, unit: int) -> range:
        """The indices of the samples of a unit that is not left out: of a pair chosen, rejected."""
        return range(unit * self.width, (unit + 1) * self.width)

    def source(self, index: int) -> str:
        return self._source(int(self._kept[index]))

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, {})

    def sample(self, index: int, decoded: dict[str, Decoded]) -> Sample:
        """Decodes the images that are not yet in `decoded`, which the sides of a pair share.

        Raises RecordError for one that is broken or has changed.
        """
        number = int(self._kept[index])
        ids, grids = self._part(number, "ids"), self._part(number, "grids")
        labels = shifted_labels(ids, self._part(number, "loss_mask"))
        positions = torch.from_numpy(position_ids(ids.numpy(), grids.tolist(), self.spec))
        pair = number // 2 if self.width > 1 else None
        return Sample(ids.long(), labels, positions, self._pixels(number, grids, decoded), grids, pair)

    def pictures(self, index: int, sample: Sample) -> list[np.ndarray]:
        """[H, W, 3] uint8: a sample's images and first frames of videos, as the model sees them."""
        file, i = self._locate(int(self._kept[index]))
        shown, first, grids = [], int(file.image_offsets[i]), sample.grid_thw
        parts = sample.pixel_values.split(grids.prod(-1).tolist())
        for value, grid, patches in zip(file.visuals[first : first + len(parts)], grids.tolist(), parts, strict=True):
            format_ = self.preparation.images if isinstance(value, str) else self.preparation.videos
            assert format_ is not None
            shown.append(format_.picture(patches, grid))
        return shown

    def _pixels(self, number: int, grids: Tensor, decoded: dict[str, Decoded]) -> Tensor:
        """[P, 3*2*16*16] patches of all images and videos of a sample. Raises RecordError."""
        samples, i = self._locate(number)
        first = int(samples.image_offsets[i])
        pixels = [torch.zeros(0, self.preparation.patch_dim)]
        for value, grid in zip(samples.visuals[first : first + len(grids)], grids.tolist(), strict=True):
            visual, key, videos = visual_from_json(value), repr(value), self.preparation.videos
            if moved := next((path for path in paths_of(visual) if os.path.realpath(path) != str(path)), None):
                raise RecordError(
                    f"{samples.sources[i]}: {moved}: has become a link, or a folder above it has, since it was measured; "
                    "empty cache_dir"
                )
            try:
                if key not in decoded:
                    times = videos.select_frames(visual).timestamps if videos and isinstance(visual, Video) else None
                    decoded[key] = (*self.preparation.patches(visual), times)
            except ImageError as error:
                raise RecordError(f"{samples.sources[i]}: {visual}: {error}") from None
            patches, new_grid, times = decoded[key]
            if list(new_grid) != grid or (not isinstance(value, str) and times != value["seconds"]):
                raise RecordError(f"{samples.sources[i]}: {visual}: has changed since it was measured; empty cache_dir")
            pixels.append(patches)
        return torch.cat(pixels)


def shifted_labels(ids: Tensor, loss_mask: Tensor) -> Tensor:
    """ids [T], loss_mask [T] -> labels [T] int64: the next token if the mask has it, else -100."""
    labels = torch.full((len(ids),), IGNORE, dtype=torch.int64)
    labels[:-1] = torch.where(loss_mask[1:], ids[1:].long(), IGNORE)
    return labels
