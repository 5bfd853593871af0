"""The endless stream of micro-batches of one rank, decoded ahead of use in worker processes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qwen35.batch import PackedBatch
from qwen35.config.schema import Attr, Settings, dataset_entries
from qwen35.data.background import background_loader
from qwen35.data.collator import check_agreement, check_patch_bucket, collate, vision_spec
from qwen35.data.dataset import Dataset, Decoded, Sample
from qwen35.data.files import ignored_sizes, longest_context, longest_text
from qwen35.data.image_processor import CONFIG
from qwen35.data.mixture import Mixture, dataset_name
from qwen35.data.packing import PackedSequences, moved_forward
from qwen35.data.preparation import Preparation
from qwen35.data.record import RecordError
from qwen35.data.serving import serving_notes
from qwen35.data.tokenized import Progress, silent
from qwen35.data.video_processor import VIDEO_CONFIG
from qwen35.errors import SettingError, UserError
from qwen35.wording import number_of, number_of_visuals

SERVED = "preprocess_parameters apply here, but a server of the exported model uses that file: set both to the same"


class MicroBatches:
    """Iterates without end over the PackedBatches of `rank`, from the start of `start_step` on.

    Micro-step a of step s takes on rank r the B packed sequences from ((s*A + a)*R + r)*B on, where
    A = gradient_accumulation_steps, R = world_size and B = micro_batch_size. So resuming needs only
    the step's number. With train_epochs each epoch ends with a step, which empty packed sequences
    fill up: so each epoch shows each sample once, and a run of more epochs goes on where one ended.
    Raises SettingError, and RecordError for an unusable record (while iterating: a damaged image).
    """

    def __init__(
        self,
        settings: Settings,
        rank: int,
        world_size: int,
        start_step: int = 0,
        progress: Progress = silent,
        pin: bool = False,
    ):
        """progress: called for each record that is tokenised. pin: batches are page-locked."""
        loader, training = settings.data.dataloader_param, settings.training
        basic = settings.data.dataset_param.basic_parameters
        self.dataset = open_dataset(settings, progress)
        self.cutoff_len = basic.cutoff_len
        sizes = tuple(self.dataset.sizes)
        weights = tuple(entry.weight for entry in dataset_entries(basic.dataset))
        weights = weights[: len(sizes)]  # max_samples may leave out the last files
        mixture = Mixture(sizes, weights, training.seed, loader.shuffle)
        self.packed_sequences = PackedSequences(
            self.dataset.lengths, basic.cutoff_len, training.seed, loader.shuffle, mixture.epoch
        )
        self.samples = len(self.dataset)
        weighted = f" {weights}" if set(weights) != {1} else ""
        order = f"{basic.cutoff_len} {training.seed} {loader.shuffle}{weighted}"
        self.fingerprint = self.dataset.fingerprint(order)  # two runs with the same one have the same micro-batches
        self.normalization = self._normalization()
        self.notes = [  # on the model folder
            *self.dataset.preparation.tokenizer.notes,
            *size_warnings(
                settings.tokenizer_dir, self.dataset.preparation, self.dataset.images, self.dataset.videos, SERVED
            ),
            *serving_notes(settings, self.dataset),
        ]
        self._beyond = _beyond_context(
            settings.model.model_name_or_path, settings.tokenizer_dir, self.dataset.sample_lengths
        )
        first = mixture.epoch(0)
        if not len(first):
            raise SettingError(f"{dataset_name(basic.dataset)}: the weights leave no sample for an epoch; raise one")
        self.shares = _shares(self.dataset, first) if weighted else ""
        self.tokens_per_epoch = int(self.dataset.lengths[first].sum())
        self.label_share = int(self.dataset.label_tokens[first].sum()) / self.tokens_per_epoch
        self.sequences_per_epoch = len(self.packed_sequences.epoch(0))  # other epochs may have a few more or fewer
        self.moved = (0, 0) if loader.shuffle else moved_forward(self.packed_sequences.epoch(0))
        self.real_share = self.tokens_per_epoch / (self.sequences_per_epoch * basic.cutoff_len)
        self._rank = (rank, world_size, training.micro_batch_size)
        self._micro_steps = training.gradient_accumulation_steps
        self._fill = world_size * training.micro_batch_size * self._micro_steps if training.train_epochs else 1
        self.start_at(start_step)
        self._batches = DecodedBatches(self.dataset, loader.patch_bucket)
        self._workers, self._pin = loader.num_workers, pin

    def _normalization(self) -> dict[str, dict[str, Any]]:
        """Where pixels come from, and how they are normalised: no token shows it."""
        dataset, preparation = self.dataset, self.dataset.preparation
        formats = (("image", dataset.images, preparation.images), ("video", dataset.videos, preparation.videos))
        return {
            kind: {"mean": f.mean, "std": f.std, "scale": f.scale, "files": dataset.files_digest(kind == "video")}
            for kind, count, f in formats
            if count and f
        }

    def start_at(self, step: int) -> None:
        """The next iteration begins with the first micro-step of `step`."""
        self._start = step * self._micro_steps

    def report(self) -> str:
        """For the start of a run: a line on the data, then on what is left out and odd."""
        return "\n".join([self.summary(), *self.warnings()])

    def warnings(self) -> list[str]:
        """What is left out of the data, and what is odd in it, a line each."""
        lines = self.dataset.left_out()
        if self.moved[0]:
            moved, farthest = number_of(self.moved[0], self.dataset.unit), number_of(self.moved[1], "packed sequence")
            lines.append(
                f"shuffle: false keeps the files' order, but packing takes {moved} forward, by up to {farthest}"
            )
        return [f"data: {line}" for line in lines + self.dataset.warnings + self._beyond]

    def summary(self) -> str:
        """A line on the data, and with weights one on each file's share."""
        files = number_of(len(self.dataset.files), "file")
        packed = number_of(self.sequences_per_epoch, "packed sequence")
        visuals = number_of_visuals(self.dataset.images, self.dataset.videos)
        return (
            f"data: {number_of(self.samples, self.dataset.unit)} of {files}, {visuals}; an epoch is "
            f"{self.tokens_per_epoch:,} tokens ({self.label_share:.1%} trained) in {packed} of {self.cutoff_len} "
            f"({self.real_share:.1%} real tokens){self.shares}"
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        order = self.packed_sequences.micro_batches(*self._rank, self._start, self._fill)
        for batch in background_loader(self._batches, order, self._workers, self._pin):
            if isinstance(batch, UserError):
                raise batch
            yield batch


def size_warnings(folder: str, preparation: Preparation, images: int, videos: int, advice: str) -> list[str]:
    """A line for each processor of a model folder whose sizes differ from the preparation's."""
    pairs = ((images, preparation.images, CONFIG), (videos, preparation.videos, VIDEO_CONFIG))
    lines = (ignored_sizes(folder, p.min_pixels, p.max_pixels, *names) for count, p, names in pairs if count and p)
    return [f"{line}; {advice}" for line in lines if line]


def _beyond_context(folder: str, tokenizer: str, lengths: np.ndarray) -> list[str]:
    """A line if samples are longer than texts that the model is made for, or that vLLM takes."""
    learned = (
        f"max_position_embeddings of {folder}/config.json allows: the model never learned such positions, and servers "
        "refuse them; extend it (YaRN), or lower cutoff_len"
    )
    served = (
        f"model_max_length of {tokenizer}/tokenizer_config.json allows, and vLLM takes no longer texts; raise it there "
        "before you export, or lower cutoff_len"
    )
    limits = (longest_context(folder), learned), (longest_text(tokenizer), served)
    limit, allowed = min(limits, key=lambda entry: entry[0])
    count = int((lengths > limit).sum())
    return [f"{number_of(count, 'sample')} of more than {limit:,.0f} tokens, which {allowed}"] if count else []


def _shares(dataset: Dataset, epoch: np.ndarray) -> str:
    """A line of the report: how many samples of each file a weighted epoch has."""
    ends = np.cumsum(dataset.sizes)
    counts = np.diff(np.searchsorted(np.sort(epoch), ends), prepend=0).tolist()
    shares = ", ".join(f"{number:,} of {samples.file}" for number, samples in zip(counts, dataset.files, strict=True))
    return f"\ndata: by weight an epoch is {number_of(len(epoch), dataset.unit)}: {shares}"


def open_dataset(settings: Settings, progress: Progress, training_attr: Attr | None = None) -> Dataset:
    """training_attr: as for `Dataset`. Raises SettingError, RecordError."""
    folder = settings.model.model_name_or_path
    spec = vision_spec(folder)
    check_patch_bucket(settings.data.dataloader_param.patch_bucket, spec)
    preparation = Preparation.of(settings)
    check_agreement(folder, settings.tokenizer_dir, preparation, spec)
    return Dataset(preparation, spec, progress, training_attr)


@dataclass(frozen=True)
class DecodedBatches:
    """What a worker runs: the samples, or pairs, of each packed sequence -> PackedBatch.

    With `on_bad_record: skip`, padding replaces a sample whose image cannot be decoded; a pair
    whole, if one of its samples cannot.
    """

    dataset: Dataset
    patch_bucket: int

    def __getitem__(self, packed: list[list[int]]) -> PackedBatch | RecordError:
        samples: list[list[Sample]] = []
        bad_records = []
        for indices in packed:
            samples.append([])
            for index in indices:
                decoded: dict[str, Decoded] = {}  # one copy of a pair's images is decoded
                try:
                    samples[-1] += [self.dataset.sample(i, decoded) for i in self.dataset.samples_of(index)]
                except RecordError as error:
                    if not self.dataset.skips_bad_records:
                        return error  # raised by the parent: the DataLoader would add a traceback
                    bad_records.append(str(error))
        preparation, spec = self.dataset.preparation, self.dataset.spec
        cutoff_len, pad_id = preparation.basic.cutoff_len, preparation.tokenizer.pad_id
        batch = collate(samples, cutoff_len, pad_id, self.patch_bucket, spec, preparation.patch_dim, preparation.pairs)
        reference = self.dataset.reference
        if reference is not None and batch.pair_numbers is not None:
            reference = reference[batch.pair_numbers]
            if reference.isnan().any():
                return RecordError("a pair's images could not be read when the reference was computed; remove its file")
        return replace(batch, bad_records=tuple(bad_records), reference=reference)
