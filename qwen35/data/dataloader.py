"""The endless stream of micro-batches of one rank, decoded ahead in worker processes."""

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from qwen35.batch import PackedBatch
from qwen35.config.schema import Attr, Settings, dataset_entries
from qwen35.data.collator import check_agreement, check_patch_bucket, collate, vision_spec
from qwen35.data.dataset import Dataset, Sample
from qwen35.data.files import ignored_sizes
from qwen35.data.image_processor import CONFIG
from qwen35.data.mixture import Mixture, dataset_name
from qwen35.data.packing import PackedSequences
from qwen35.data.record import RecordError
from qwen35.data.shared_batch import SharedBatch, shared_memory
from qwen35.data.tokenized import Preparation, Progress, untold
from qwen35.data.video_processor import VIDEO_CONFIG
from qwen35.errors import SettingError, UserError
from qwen35.processes import die_with, obey
from qwen35.wording import number_of, number_of_visuals

PROBE = 1 << 20  # bytes of shared memory that there must be before workers are started


class MicroBatches:
    """Iterates over PackedBatch without end: those of `rank`, from the first micro-step of `start_step` on.

    Micro-step a of rank r in step s takes the bins ((s*A + a)*R + r)*B …, A = gradient_accumulation_steps, R = world_size,
    B = micro_batch_size: the step number is all that resuming needs.
    Raises SettingError, and RecordError for a record that cannot be used (while iterating: for a damaged image).
    """

    def __init__(
        self,
        settings: Settings,
        rank: int,
        world_size: int,
        start_step: int = 0,
        progress: Progress = untold,
        pin: bool = False,
    ):
        """progress: is told of each record as it is tokenised. pin: page-locked batches."""
        loader, training = settings.data.dataloader_param, settings.training
        basic = settings.data.dataset_param.basic_parameters
        self.dataset = open_dataset(settings, progress)
        self.cutoff_len = basic.cutoff_len
        sizes = tuple(self.dataset.sizes)
        weights = tuple(entry.weight for entry in dataset_entries(basic.dataset))[
            : len(sizes)
        ]  # max_samples ends early
        mixture = Mixture(sizes, weights, training.seed, loader.shuffle)
        self.packed_sequences = PackedSequences(
            self.dataset.lengths, basic.cutoff_len, training.seed, loader.shuffle, mixture.epoch
        )
        self.samples = len(self.dataset)
        weighted = f" {weights}" if set(weights) != {1} else ""
        order = f"{basic.cutoff_len} {training.seed} {loader.shuffle}{weighted}"
        self.fingerprint = self.dataset.fingerprint(order)  # the same where every bin of every epoch is the same
        self.levels = self._levels()
        self.not_read = self._not_read(settings)
        first = mixture.epoch(0)
        if not len(first):
            raise SettingError(f"{dataset_name(basic.dataset)}: the weights leave no sample for an epoch; raise one")
        self.shares = _shares(self.dataset, first) if weighted else ""
        self.tokens_per_epoch = int(self.dataset.lengths[first].sum())
        self.trained_share = int(self.dataset.trained[first].sum()) / self.tokens_per_epoch
        self.sequences_per_epoch = len(
            self.packed_sequences.epoch(0)
        )  # of the first; shuffled otherwise, another may differ a little
        self.real_share = self.tokens_per_epoch / (self.sequences_per_epoch * basic.cutoff_len)
        self._order = _Order(self.packed_sequences, rank, world_size, training.micro_batch_size, 0)
        self._micro_steps = training.gradient_accumulation_steps
        self.start_at(start_step)
        self._batches = DecodedBatches(self.dataset, loader.patch_bucket)
        self._workers, self._pin = loader.num_workers, pin

    def _levels(self) -> dict[str, dict[str, Any]]:
        """What becomes of the pixels of the images and videos that there are, of which their tokens say nothing."""
        dataset, made_by = self.dataset, self.dataset.preparation
        formats = (("image", dataset.images, made_by.images), ("video", dataset.videos, made_by.videos))
        return {kind: {"mean": f.mean, "std": f.std, "scale": f.scale} for kind, count, f in formats if count}

    def _not_read(self, settings: Settings) -> list[str]:
        """What the model folder says of the sizes of the images and videos that there are, if it is not what is done."""
        limits, folder = settings.data.dataset_param.preprocess_parameters, settings.tokenizer_dir
        image, video = (
            (limits.image_min_pixels, limits.image_max_pixels),
            (limits.video_min_pixels, limits.video_max_pixels),
        )
        found = (
            ignored_sizes(folder, *image, *CONFIG) if self.dataset.images else None,
            ignored_sizes(folder, *video, *VIDEO_CONFIG) if self.dataset.videos else None,
        )
        told = "; preprocess_parameters count here, that file for whoever serves an export: set the two alike"
        return [f"{line}{told}" for line in found if line]

    def start_at(self, step: int) -> None:
        """Have the next iteration begin with the first micro-step of `step`."""
        self._order = replace(self._order, start=step * self._micro_steps)

    def report(self) -> str:
        """For the start of a run: one line, and one more of records that were left out."""
        files = number_of(len(self.dataset.files), "file")
        skipped = self.dataset.skipped
        left_out = (
            f"\ndata: skipped {len(skipped):,} of {self.dataset.records:,} records: {skipped}" if len(skipped) else ""
        )
        cut = self.dataset.truncated
        if cut.numbers:
            left_out += (
                f"\ndata: cut {number_of(len(cut.numbers), 'sample')} to cutoff_len, {number_of(cut.tokens, 'token')} and "
                f"{number_of_visuals(cut.images, cut.videos)} of theirs are not trained"
            )
        left_out += "".join(f"\ndata: {line}" for line in self.dataset.told)
        bins = f"{number_of(self.sequences_per_epoch, 'bin')} of {self.cutoff_len} ({self.real_share:.1%} real tokens)"
        visuals = number_of_visuals(self.dataset.images, self.dataset.videos)
        return (
            f"data: {number_of(self.samples, 'sample')} of {files}, {visuals}; an epoch is "
            f"{self.tokens_per_epoch:,} tokens ({self.trained_share:.1%} trained) in {bins}{self.shares}{left_out}"
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        for batch in in_background(self._batches, self._order, self._workers, self._pin):
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _shares(dataset: Dataset, epoch: np.ndarray) -> str:
    """For messages: how many of an epoch's samples are of each file, which weights make another number than it has."""
    ends = np.cumsum(dataset.sizes)
    each = np.diff(np.searchsorted(np.sort(epoch), ends), prepend=0).tolist()
    named = ", ".join(f"{number:,} of {samples.file}" for number, samples in zip(each, dataset.files, strict=True))
    return f"\ndata: by weight an epoch is {number_of(len(epoch), 'sample')}: {named}"


def open_dataset(settings: Settings, progress: Progress, vetted: Attr | None = None) -> Dataset:
    """vetted: as for `Dataset`. Raises SettingError, RecordError."""
    folder = settings.model.model_name_or_path
    spec = vision_spec(folder)
    check_patch_bucket(settings.data.dataloader_param.patch_bucket, spec)
    preparation = Preparation.of(settings)
    check_agreement(folder, settings.tokenizer_dir, preparation, spec)
    return Dataset(preparation, spec, progress, vetted)


def in_background(
    batches: "DecodedBatches", order: Iterable[list[list[int]]], workers: int, pin: bool, again: bool = False
) -> "DataLoader[PackedBatch | UserError]":
    """pin: batches come page-locked, by a thread. again: it is iterated over several times, by the same workers.

    Raises SettingError where /dev/shm is full.
    """
    if workers:
        shared_memory(PROBE)  # which is given back at once: the DataLoader's own start fails with a traceback
    return DataLoader(
        batches,  # type: ignore[arg-type]  # anything with __getitem__ will do
        batch_size=None,
        sampler=order,
        num_workers=workers,
        collate_fn=_wrapped if workers else _as_it_is,
        worker_init_fn=partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # its own, so that opening a loader leaves the global one alone
        multiprocessing_context="fork" if workers else None,  # the tokens are shared, not copied
        pin_memory=pin,
        persistent_workers=again and workers > 0,
    )


@dataclass(frozen=True)
class _Order:
    """The samples of each micro-batch, bin by bin."""

    packed_sequences: PackedSequences
    rank: int
    world_size: int
    micro_batch_size: int
    start: int

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self.packed_sequences.micro_batches(self.rank, self.world_size, self.micro_batch_size, self.start)


@dataclass(frozen=True)
class DecodedBatches:
    """Samples of a micro-batch, bin by bin -> PackedBatch; what a worker runs.

    With `on_bad_record: skip` a sample whose image cannot be decoded leaves its place to padding, so nothing counts it.
    """

    dataset: Dataset
    patch_bucket: int

    def __getitem__(self, bins: list[list[int]]) -> PackedBatch | RecordError:
        samples: list[list[Sample]] = []
        bad_records = []
        for content in bins:
            samples.append([])
            for i in content:
                try:
                    samples[-1].append(self.dataset[i])
                except RecordError as error:
                    if not self.dataset.skips:
                        return error  # the DataLoader would wrap it into a traceback
                    bad_records.append(str(error))
        preparation, spec = self.dataset.preparation, self.dataset.spec
        cutoff_len, pad_id = preparation.basic.cutoff_len, preparation.tokenizer.pad_id
        batch = collate(samples, cutoff_len, pad_id, self.patch_bucket, spec, preparation.images.values)
        return replace(batch, bad_records=tuple(bad_records))


def _as_it_is(batch: Any) -> Any:
    return batch


def _wrapped(batch: Any) -> Any:
    try:
        return SharedBatch(batch) if isinstance(batch, PackedBatch) else batch
    except SettingError as error:
        return error


def _start_worker(parent: int, _: int) -> None:
    die_with(parent)
    # a signal to the whole job is for the parent, which needs its batches to go on until it saves; what ends a worker is
    # its parent's end, or its parent's own SIGTERM: Python's way out waits for the workers once it has sent that
    obey(parent)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
