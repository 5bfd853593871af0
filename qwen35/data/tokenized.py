"""Tokenises the records of a file once, on all cores, and keeps the samples in cache_dir if set.

Images and videos are only measured here; their pixels are decoded when a batch needs them.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NoReturn

from qwen35.data.background import results
from qwen35.data.conversations import wanted_answers
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.fields import FieldNames
from qwen35.data.files import try_lock
from qwen35.data.formats import parse_records, read_records
from qwen35.data.media import ImageFolder
from qwen35.data.preparation import Preparation, TokenisedSample
from qwen35.data.readers import read_values
from qwen35.data.record import Record, RecordError, Video, Visual
from qwen35.data.samples import Collected, FileSamples, read_samples, write_samples
from qwen35.data.shards import Shards
from qwen35.data.template import dropped_thoughts
from qwen35.data.tokenizer import Extent, Spelled
from qwen35.errors import UserError

POLL_INTERVAL = 0.1  # seconds between looks for the entry that another process makes
BYTES_PER_WORKER = 1 << 18  # of a file; to start a process costs as much time as to tokenise these
RECORDS_PER_JOB = 64  # for one process at a time
JOBS_PER_SHARD = 128  # for one machine at a time
Progress = Callable[[str, int], object]  # called with (what is being read, records read since the last call)
Tokenised = Iterator[tuple[Record, list[tuple[Record, TokenisedSample]]]]


def silent(what: str, records: int) -> None:
    """Progress that is not shown."""


def load_files(preparation: Preparation, progress: Progress = silent) -> Iterator[FileSamples]:
    """The samples of each file of the dataset, up to its first `max_samples` records."""
    left = preparation.basic.max_samples
    for file, of_file in preparation.files():
        if left == 0:
            break
        samples = load_samples(file, of_file, left, progress)
        left = None if left is None else left - samples.records
        yield samples


def load_samples(file: Path, preparation: Preparation, limit: int | None, progress: Progress = silent) -> FileSamples:
    """The samples of the first `limit` records of a file, from cache_dir if they are there.

    One process of each machine makes its share of them, and writes the entry once all are there;
    the others wait, or take over if that process ends without writing it.
    """
    progress(str(file), 0)
    if preparation.basic.cache_dir is None:
        return make_samples(file, preparation, limit, progress)
    folder = Path(preparation.basic.cache_dir)
    entry = folder / f"{file.stem}-{preparation.cache_key(file, limit)}.safetensors"
    samples = read_samples(entry)
    while samples is None:
        with try_lock(folder) as has_lock:
            if entry.is_file():
                samples = read_samples(entry)
            elif has_lock and (samples := _make_shared(file, preparation, limit, progress, Shards(entry))):
                samples = read_samples(entry) or samples  # the processes share the file's pages, not this memory
        if samples is None:
            progress(f"{file}, which another process tokenises", 0)
            time.sleep(POLL_INTERVAL)
    return samples


def _make_shared(
    file: Path, preparation: Preparation, limit: int | None, progress: Progress, shards: Shards
) -> FileSamples | None:
    """Make the shards that no other machine makes, and the entry; None if it may be there already.

    Raises RecordError, SettingError.
    """
    try:
        while not shards.entry.is_file():
            parts = _parts(file, preparation, limit, progress, shards.claim)
            for shard, group in groupby(parts, key=lambda part: part[0]):
                made = Collected(DataWarnings.expecting(preparation.names))
                for _, part in group:
                    shards.keep()
                    made.extend(part)
                shards.write(shard, made.samples(str(file)))
            while (
                (missing := shards.missing()) and not any(map(shards.is_free, missing)) and not shards.entry.is_file()
            ):
                progress(f"{file}, of which other machines tokenise {len(missing)} shards", 0)
                time.sleep(POLL_INTERVAL)
            made = Collected(DataWarnings.expecting(preparation.names))
            if not missing and shards.joined(made):
                samples = made.samples(str(file))
                write_samples(samples, shards.entry)
                shards.remove()
                return samples
    except UserError:  # the next run's entry has another name
        shards.remove()
        raise
    return None


def tokenised(
    file: Path,
    preparation: Preparation,
    limit: int | None = None,
    skip: Callable[[RecordError], object] | None = None,
    warnings: DataWarnings | None = None,
) -> Tokenised:
    """The first `limit` records, with the conversations that each is trained as, and their samples.

    skip, warnings: as for `read_records`.
    """
    skip = skip or partial(_refuse, preparation.basic.dataset_dir)
    folder, pairs = preparation.folder(), preparation.pairs
    records = read_records(file, preparation.attr, folder, limit, skip=skip, warnings=warnings, pairs=pairs)
    return tokenised_records(records, preparation, skip, warnings)


def tokenised_records(
    records: Iterable[Record],
    preparation: Preparation,
    skip: Callable[[RecordError], object],
    warnings: DataWarnings | None,
) -> Tokenised:
    """As `tokenised`."""
    for record in records:
        try:
            parts = preparation.tokenise(record)
        except RecordError as error:
            skip(error)
        else:
            if warnings is not None:
                count_parts(warnings, record, parts, preparation)
            yield record, parts


def count_parts(
    warnings: DataWarnings, record: Record, parts: Sequence[tuple[Record, TokenisedSample]], preparation: Preparation
) -> None:
    """Of a record and what is trained of it."""
    spelled: Spelled = {}
    for outcome, tokens in (item for _, sample in parts for item in sample.spelled.items()):
        spelled[outcome] = spelled.get(outcome, set()) | tokens
    warnings.count_spelled(spelled, record.source)
    for kind in max((sample.odd for _, sample in parts), key=len):
        warnings.count(kind, 1, record.source)
    sides = [record, record.rejected] if record.rejected else [record]
    wanted = [side.turns[i] for side in sides for i in wanted_answers(side, preparation.basic.mask_history)]
    trained = sum(len(wanted_answers(part, False)) - sample.unseen for part, sample in parts)
    marked = sum(turn.loss is True and turn.role == "assistant" for turn in record.turns)
    for kind, count in (
        ("split", len(parts) > len(sides)),
        ("thoughts", sum(dropped_thoughts(part, preparation.style) for part, _ in parts)),
        ("masked", marked and marked - sum(turn.loss is True for turn in wanted)),
        ("unseen", len(wanted) - trained),
    ):
        if count:
            warnings.count(kind, count, record.source)


def _refuse(dataset_dir: str, error: RecordError) -> NoReturn:
    hint = f", dataset_dir is {dataset_dir}" if error.kind.endswith(" missing") else ""
    raise RecordError(f"{error}{hint}; on_bad_record: skip leaves such records out", error.kind, error.image) from None


def make_samples(file: Path, preparation: Preparation, limit: int | None, progress: Progress = silent) -> FileSamples:
    """Read and tokenise a file. Raises RecordError for an unusable record, unless it is skipped."""
    made = Collected(DataWarnings.expecting(preparation.names))
    for _, part in _parts(file, preparation, limit, progress, lambda shard: True):
        made.extend(part)
    return made.samples(str(file))


def workers_for(file: Path, limit: int | None, for_all: bool) -> int:
    """How many processes are to tokenise a file; 0: none but this one.

    for_all: this one does it for all ranks of the machine, else each rank does it for itself.
    """
    cores = len(os.sched_getaffinity(0)) // (1 if for_all else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    most = min(file.stat().st_size // BYTES_PER_WORKER, cores, (limit or 1 << 60) // RECORDS_PER_JOB)
    return most if most > 1 else 0


@dataclass(frozen=True)
class Job:
    """Values of a file, in number from `first` on."""

    shard: int
    first: int
    values: list[Any]
    counts: dict[str, dict[str, tuple[int, str]]]  # of the warnings from reading them


def _jobs(file: Path, names: FieldNames, limit: int | None, claim: Callable[[int], bool]) -> Iterator[Job | UserError]:
    """The jobs of claimed shards, and an error of reading in its place among them."""
    warnings, first, is_claimed = DataWarnings(), 0, False
    values = islice(read_values(file, True, names.needs_value, warnings), limit)
    try:
        while records := list(islice(values, RECORDS_PER_JOB)):
            shard, place = divmod(first, RECORDS_PER_JOB * JOBS_PER_SHARD)
            is_claimed = claim(shard) if place == 0 else is_claimed
            if is_claimed:
                yield Job(shard, first + 1, records, warnings.counts)
            warnings.counts = {}
            first += len(records)
    except UserError as error:
        yield error


@dataclass(frozen=True)
class Tokeniser:
    """What a worker runs: Job -> (shard, samples)."""

    file: Path
    preparation: Preparation
    names: FieldNames
    folder: ImageFolder
    progress: Progress

    def __getitem__(self, job: Job | UserError) -> tuple[int, Collected] | UserError:
        if isinstance(job, UserError):
            return job
        made = Collected(DataWarnings.expecting(self.names))
        made.warnings.counts = job.counts

        def skip(error: RecordError) -> None:
            if self.preparation.basic.on_bad_record != "skip":
                _refuse(self.preparation.basic.dataset_dir, error)
            made.skipped.add(error)
            self.progress(str(error), 1)

        try:
            records = parse_records(job.values, self.file, job.first, self.names, self.folder, made.warnings, skip=skip)
            for record, parts in tokenised_records(records, self.preparation, skip, made.warnings):
                self.progress(record.source, 1)
                for part, sample in parts:
                    made.add(ids=sample.ids.data, loss_mask=sample.loss_mask.data, offsets=len(sample.ids))
                    made.add(grids=sample.grids, image_offsets=len(sample.grids))
                    made.add_values("source", [part.source])
                    pairs = zip(part.visuals, sample.extents, strict=True)
                    made.add_values("visual", (visual_to_json(*pair) for pair in pairs))
        except UserError as error:
            return error
        made.records = len(job.values)
        return job.shard, made


def _parts(
    file: Path, preparation: Preparation, limit: int | None, progress: Progress, claim: Callable[[int], bool]
) -> Generator[tuple[int, Collected], None, None]:
    """(shard, samples) of each job, in order. claim: whether to make a shard, asked for each."""
    names = preparation.names
    workers = workers_for(file, limit, preparation.basic.cache_dir is not None)
    tokeniser = Tokeniser(file, preparation, names, preparation.folder(), silent if workers else progress)
    advice = "a run has one for each core that taskset leaves to it"
    with closing(results(tokeniser, _jobs(file, names, limit, claim), workers, advice)) as parts:
        for shard, made in parts:
            if workers:
                progress(f"{file}, part {shard}", made.records)
            yield shard, made


def visual_to_json(visual: Visual, extent: Extent) -> str | dict[str, Any]:
    """A JSON value, from which visual_from_json makes the image's path or the Video again."""
    if not isinstance(visual, Video) or isinstance(extent, int):
        return str(visual)
    source = str(visual.source) if isinstance(visual.source, Path) else [str(frame) for frame in visual.source]
    return {"source": source, "fps": visual.fps, "seconds": [seconds for seconds, _ in extent]}


def visual_from_json(plain: str | dict[str, Any]) -> Visual:
    """The image or video of an item of `FileSamples.visuals`."""
    if isinstance(plain, str):
        return Path(plain)
    source = plain["source"]
    return Video(Path(source) if isinstance(source, str) else tuple(map(Path, source)), plain["fps"])


def paths_of(visual: Visual) -> tuple[Path, ...]:
    """The files or folder of an image or video, whose links were resolved when it was read."""
    source = visual.source if isinstance(visual, Video) else visual
    return source if isinstance(source, tuple) else (source,)
