"""Tokenises the records of a file once, and keeps the samples in cache_dir if that is set.

Images and videos are only measured here; their pixels are decoded when a batch needs them.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen35.data.conversations import wanted_answers
from qwen35.data.data_warnings import DataWarnings, Skipped
from qwen35.data.files import replacing, try_lock
from qwen35.data.formats import read_records
from qwen35.data.preparation import Preparation, TokenisedSample
from qwen35.data.record import Record, RecordError, Video, Visual
from qwen35.data.template import dropped_thoughts
from qwen35.data.tokenizer import Extent, Spelled
from qwen35.errors import SettingError, one_line

POLL_INTERVAL = 0.1  # seconds between looks for the entry that another process makes
Progress = Callable[[str, int], object]  # called with (what is being read, records read since the last call)


def silent(what: str, records: int) -> None:
    """Progress that is not shown."""


@dataclass(frozen=True)
class FileSamples:
    """The N samples of one file, laid end to end, and what was left out."""

    file: str
    ids: Tensor  # [tokens] int32
    loss_mask: Tensor  # [tokens] bool
    offsets: Tensor  # [N+1] int64: sample i is tokens offsets[i]:offsets[i+1]
    grids: Tensor  # [M, 3] int64 of all images and videos
    image_offsets: Tensor  # [N+1] int64: sample i has grids image_offsets[i]:image_offsets[i+1]
    sources: list[str]  # of each sample, for messages
    visuals: list[str | dict[str, Any]]  # [M], each as visual_to_json writes it
    records: int  # records read, of one sample or several each, and those left out
    skipped: Skipped
    warnings: DataWarnings


def load_samples(file: Path, preparation: Preparation, limit: int | None, progress: Progress = silent) -> FileSamples:
    """The samples of the first `limit` records of a file, from cache_dir if they are there.

    One process of a machine makes them and writes the entry; the others wait until it is there, or
    take over if that process ends without writing it.
    """
    progress(str(file), 0)
    if preparation.basic.cache_dir is None:
        return make_samples(file, preparation, limit, progress)
    folder = Path(preparation.basic.cache_dir)
    entry = folder / f"{file.stem}-{preparation.cache_key(file, limit)}.safetensors"
    samples = _load_entry(entry)
    while samples is None:
        with try_lock(folder) as has_lock:
            if entry.is_file():
                samples = _load_entry(entry)
            elif has_lock:
                samples = make_samples(file, preparation, limit, progress)
                _write(samples, entry)
                samples = _load_entry(entry) or samples  # the processes share the file's pages, not this memory
        if samples is None:
            progress(f"{file}, which another process tokenises", 0)
            time.sleep(POLL_INTERVAL)
    return samples


def _load_entry(entry: Path) -> FileSamples | None:
    """The samples of an entry, or None; an entry that is damaged or outdated is removed."""
    if not entry.is_file():
        return None
    try:
        samples = _read(entry)
        if not samples.skipped.is_outdated():
            return samples
    except (SafetensorError, ValueError):  # ValueError: the digest does not match
        pass
    entry.unlink(missing_ok=True)  # now: later, a file of this name may be another process's new entry
    return None


def tokenised(
    file: Path,
    preparation: Preparation,
    limit: int | None = None,
    skip: Callable[[RecordError], object] | None = None,
    warnings: DataWarnings | None = None,
) -> Iterator[tuple[Record, list[tuple[Record, TokenisedSample]]]]:
    """The first `limit` records, with the conversations that each is trained as, and their samples.

    skip, warnings: as for `read_records`.
    """
    skip = skip or partial(_refuse, preparation.basic.dataset_dir)
    for record in read_records(file, preparation.attr, preparation.folder(), limit, skip=skip, warnings=warnings):
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
    wanted = wanted_answers(record, preparation.basic.mask_history)
    trained = sum(len(wanted_answers(part, False)) - sample.unseen for part, sample in parts)
    marked = sum(turn.loss is True and turn.role == "assistant" for turn in record.turns)
    for kind, count in (
        ("split", len(parts) > 1),
        ("thoughts", sum(dropped_thoughts(part, preparation.style) for part, _ in parts)),
        ("masked", marked and marked - sum(record.turns[i].loss is True for i in wanted)),
        ("unseen", len(wanted) - trained),
    ):
        if count:
            warnings.count(kind, count, record.source)


def _refuse(dataset_dir: str, error: RecordError) -> NoReturn:
    hint = f", dataset_dir is {dataset_dir}" if error.kind.endswith(" missing") else ""
    raise RecordError(f"{error}{hint}; on_bad_record: skip leaves such records out", error.kind, error.image) from None


def make_samples(file: Path, preparation: Preparation, limit: int | None, progress: Progress = silent) -> FileSamples:
    """Read and tokenise a file. Raises RecordError for an unusable record, unless it is skipped."""
    ids, loss_mask = bytearray(), bytearray()  # joining a list of arrays would take twice the memory
    grids, sources, visuals = [], [], []
    lengths, visual_counts = [0], [0]
    skipped, warnings = Skipped(), DataWarnings.expecting(preparation.attr)

    def add_skipped(error: RecordError) -> None:
        skipped.add(error)
        progress(str(error), 1)

    skip = add_skipped if preparation.basic.on_bad_record == "skip" else None
    records = 0
    for record, parts in tokenised(file, preparation, limit, skip, warnings):
        progress(record.source, 1)
        records += 1
        for part, sample in parts:
            ids += sample.ids.data
            loss_mask += sample.loss_mask.data
            lengths.append(len(sample.ids))
            grids += sample.grids
            visual_counts.append(len(sample.grids))
            sources.append(part.source)
            visuals += [visual_to_json(*pair) for pair in zip(part.visuals, sample.extents, strict=True)]
    return FileSamples(
        str(file),
        torch.frombuffer(ids, dtype=torch.int32) if ids else torch.zeros(0, dtype=torch.int32),
        torch.frombuffer(loss_mask, dtype=torch.bool) if ids else torch.zeros(0, dtype=torch.bool),
        torch.tensor(lengths).cumsum(0),
        torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        torch.tensor(visual_counts).cumsum(0),
        sources,
        visuals,
        records + len(skipped),
        skipped,
        warnings,
    )


# what a cache entry holds of FileSamples: tensors, and fields as JSON
TENSORS = ("ids", "loss_mask", "offsets", "grids", "image_offsets")
JSON_FIELDS = ("file", "sources", "visuals", "records")


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


def _read(path: Path) -> FileSamples:
    """The tensors stay mapped from the file, whose pages the processes of a machine share."""
    with safe_open(path, framework="pt") as entry:
        tensors = {key: entry.get_tensor(key) for key in (*TENSORS, "names")}
        if (entry.metadata() or {}).get("digest") != _digest(tensors):
            raise ValueError(f"{path}: is not what was written")
    names = json.loads(tensors.pop("names").numpy().tobytes())
    names["skipped"], names["warnings"] = Skipped(**names["skipped"]), DataWarnings(**names["warnings"])
    return FileSamples(**tensors, **names)


def _write(samples: FileSamples, path: Path) -> None:
    """Raises SettingError."""
    names = {name: getattr(samples, name) for name in JSON_FIELDS}
    names |= {part: asdict(getattr(samples, part)) for part in ("skipped", "warnings")}
    tensors = {name: getattr(samples, name) for name in TENSORS}
    tensors["names"] = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
    try:
        with replacing(path, keep_first=True) as temporary:
            save_file(tensors, temporary, {"digest": _digest(tensors)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # before the rename: a machine that goes down must not leave half an entry
    except (OSError, SafetensorError) as error:  # safetensors raises its own where it cannot write
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SettingError(f"data.dataset_param.basic_parameters.cache_dir: {path.parent}: {reason}") from None


def _digest(tensors: dict[str, Tensor]) -> str:
    """Covers names, types, shapes and every byte; takes 0.1 s for the tokens of 150,000 records."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
