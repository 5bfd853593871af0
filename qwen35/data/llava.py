"""Converts LLaVA-Instruct and the images of COCO into training records.

Writes a JSON list of {"images": ["./train2017/X.jpg"], "messages": [{"role": "user", "content": …},
…]}, and a report beside it. Several processes check the records and the headers of their images.
"""

import json
import os
import sys
from array import array
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data.background import results
from qwen35.data.content import MISSING
from qwen35.data.data_warnings import DataWarnings, Skipped
from qwen35.data.fields import FieldNames, is_nothing
from qwen35.data.files import replacing
from qwen35.data.formats import parse_record
from qwen35.data.histogram import draw, histogram
from qwen35.data.image_processor import ImageError, ImageProcessor, Odd, upright_size
from qwen35.data.media import ImageFolder
from qwen35.data.preparation import Preparation
from qwen35.data.readers import read_values
from qwen35.data.record import IMAGE_PLACEHOLDER, PLACEHOLDER, Record, RecordError, Turn
from qwen35.data.tokenized import count_parts
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VideoProcessor
from qwen35.errors import SettingError, UserError, visible
from qwen35.wording import number_of

MAX_NAMES = 5  # missing images that a message names
MAX_ERRORS = 1000  # of records left out, in the report file
RECORDS_PER_JOB = 256  # for one process at a time

Job = tuple[int, list[Any]]  # number of its first record, from 1, and the JSON values


@dataclass(frozen=True)
class Options:
    llava: Path
    images: Path
    out: Path
    on_missing: Literal["error", "skip"] = "error"
    on_bad_record: Literal["error", "skip"] = "error"
    check: Literal["headers", "none"] = "headers"
    tokenizer: Path | None = None  # model folder
    workers: int | None = None  # default: the cores of this machine that may be used

    def tolerates(self, error: RecordError) -> bool:
        return self.on_bad_record == "skip" or (error.kind == MISSING and self.on_missing == "skip")

    def relative(self, image: str | None) -> str:
        return os.path.relpath(image or "", os.path.realpath(self.images))


@dataclass(frozen=True)
class Converted:
    line: str  # JSON
    turns: int
    images: int
    lengths: list[int]  # tokens of its samples, or characters of the record


@dataclass
class Tally:
    """What was written, and what was left out."""

    records: int = 0
    turns: int = 0
    images: int = 0
    lengths: "array[int]" = field(default_factory=lambda: array("q"))  # see Converted
    skipped: Skipped = field(default_factory=Skipped)
    warnings: DataWarnings = field(default_factory=DataWarnings)
    errors: list[str] = field(default_factory=list)  # messages of the first records left out


def convert(options: Options) -> str:
    """Write `out`, whole or not at all, and its report, which is returned.

    The paths in the records are relative to the folder above `images`. Raises SettingError for
    files and folders, RecordError for an unusable record that is not to be skipped.
    """
    llava, images, out = options.llava, options.images, options.out
    if not llava.is_file():
        raise SettingError(f"{llava}: no such file; set LLAVA to llava_instruct_150k.json")
    if not images.is_dir():
        raise SettingError(f"{images}: no such folder; set IMAGES to the folder of the images, e.g. …/train2017")
    if out.exists() and out.samefile(llava):
        raise SettingError(f"{out}: is the input file; set OUT to another")
    if options.tokenizer is not None and options.check == "none":
        raise SettingError("--tokenizer counts the tokens of images, so it reads their headers: leave out --check none")
    llava.open("rb").close()  # if unreadable, an OSError that names it; those below are reported as of `out`
    tally, unit, limit = Tally(), "characters per record", None
    if options.tokenizer is not None:
        unit, limit = "tokens per sample", BasicParameters("").cutoff_len
    text, picture = out.with_suffix(".report.txt"), out.with_suffix(".lengths.png")
    try:
        with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.write("[\n")
            with closing(_lines(options, tally)) as lines:
                stream.writelines(lines)
            stream.write("\n]\n")
        lengths = np.asarray(tally.lengths)
        report = _report(options, tally, histogram(lengths, unit, limit))
        with replacing(text) as temporary:
            more = len(tally.skipped) - len(tally.errors)
            listed = [report, *tally.errors, *([f"… and {more:,} more"] if more else [])]
            temporary.write_text("\n".join(listed) + "\n", encoding="utf-8")
        with replacing(picture) as temporary:
            draw(lengths, unit, out.name, temporary, limit)
    except OSError as error:
        raise SettingError(f"{out}: cannot be written: {error.strerror}") from None
    return f"{report}\nreport written to {text}, {picture}"


def _lines(options: Options, tally: Tally) -> Generator[str, None, None]:
    """Raises RecordError."""
    missing: list[str] = []
    separator = ""
    bar = tqdm(desc="convert", unit=" records", disable=not sys.stderr.isatty(), leave=False)
    with bar:
        for result in _results(options, tally):
            bar.update()
            if isinstance(result, Converted):
                tally.turns += result.turns
                tally.images += result.images
                tally.records += 1
                tally.lengths.extend(result.lengths)
                yield separator + result.line
                separator = ",\n"
            elif options.tolerates(result):
                tally.skipped.add(result)
                tally.errors += [str(result)] * (len(tally.errors) < MAX_ERRORS)
            elif result.kind == MISSING:  # collected, to report all at once
                missing.append(options.relative(result.image))
            else:
                raise RecordError(f"{result}; --on_bad_record skip leaves such records out", result.kind, result.image)
    if missing:
        raise RecordError(
            f"{options.llava}: {number_of(len(missing), 'image')} not in {options.images}: {_names(missing)}; "
            "--on_missing skip leaves such records out"
        )
    if not tally.lengths:
        raise RecordError(f"{options.llava}: no records" + (f" left: {tally.skipped}" if tally.errors else ""))


def _results(options: Options, tally: Tally) -> Iterator[Converted | RecordError]:
    """In the order of the records, which several processes convert."""
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    workers = workers if workers > 1 else 0
    for converted, warnings in results(Converter(options), _jobs(options), workers, "--workers 1 needs the least"):
        tally.warnings.update(warnings)
        yield from converted


def _jobs(options: Options) -> Iterator[Job]:
    values, first = read_values(options.llava, lenient=options.on_bad_record == "skip"), 1
    while records := list(islice(values, RECORDS_PER_JOB)):
        yield first, records
        first += len(records)


def _report(options: Options, tally: Tally, lengths: str) -> str:
    out, skipped = options.out, tally.skipped
    lines = [f"{out}: {tally.records:,} records, {tally.turns:,} turns, {tally.images:,} images"]
    if n := skipped.kinds.get(MISSING, 0):
        names = [options.relative(image) for image, state in skipped.images.items() if state == "missing"]
        lines.append(f"left out: {number_of(n, 'record')} whose image is not in {options.images}: {_names(names)}")
    if len(skipped) > n:
        lines.append(f"left out: {len(skipped):,} records in all: {skipped}")
    if options.check == "none":
        lines.append("the images were not checked (--check none)")
    lines += [*tally.warnings.lines("LLaVA's field is image"), lengths]
    if options.tokenizer is None:
        lines.append("to count tokens instead of characters, name a model folder: make data HF=…")
    lines.append(f"for training: dataset={out}, dataset_dir={Path(os.path.realpath(options.images)).parent}")
    return visible("\n".join(lines), keep="\n")


def _names(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")


class Converter:
    """Converts the records of one job, and collects the warnings about them."""

    def __init__(self, options: Options):
        """Raises SettingError."""
        self._options, self._names = options, FieldNames.of(Attr())
        self._folder = ImageFolder(options.images)
        self._root = f"{self._folder.real_root}/"
        self._prefix = f"./{self._folder.real_root.name}/"
        self._images: dict[Path, Odd | ImageError] = {}  # many records share an image
        self._preparation = None if options.tokenizer is None else _preparation(options.tokenizer)

    def __getitem__(self, job: Job) -> "tuple[list[Converted | RecordError], DataWarnings] | UserError":
        warnings = DataWarnings()
        try:
            return [self._convert(raw, number, warnings) for number, raw in enumerate(job[1], job[0])], warnings
        except UserError as error:  # of the whole job
            return error

    def _convert(self, raw: Any, number: int, warnings: DataWarnings) -> Converted | RecordError:
        if isinstance(raw, RecordError):
            return raw
        found = DataWarnings()
        try:
            record = parse_record(raw, f"{self._options.llava}, record {number}", self._names, self._folder, found)
            others = record.videos or record.tools or not is_nothing(raw.get("objects"))
            if others or any(turn.reasoning or turn.tool_calls for turn in record.turns):
                raise record.error("has videos, thoughts, tools, calls or boxes, unlike LLaVA's; train on it as it is")
            if self._preparation is not None:
                parts = self._preparation.tokenise(record)
                lengths = [len(sample.ids) for _, sample in parts]
                count_parts(found, record, parts, self._preparation)
            else:
                for kind in self._check(record) if self._options.check == "headers" else ():
                    found.count(kind, 1, record.source)
                lengths = [sum(len(turn.text) for turn in record.turns) + len(IMAGE_PLACEHOLDER) * len(record.images)]
        except RecordError as error:
            return error
        warnings.update(found)
        messages = [_message(turn, has_images=bool(record.images)) for turn in record.turns]
        images = [self._prefix + str(path).removeprefix(self._root) for path in record.images]
        line = json.dumps({"images": images, "messages": messages}, ensure_ascii=False)
        return Converted(line, len(messages), len(images), lengths)

    def _check(self, record: Record) -> Odd:
        """Raises RecordError."""
        all_odd = Odd()
        for number, path in enumerate(record.images, 1):
            if path not in self._images:
                try:
                    self._images[path] = odd = Odd()
                    upright_size(path, odd)
                except ImageError as error:
                    self._images[path] = error
            if isinstance(found := self._images[path], ImageError):
                image = f"image {number} of {len(record.images)}, {path}"
                raise record.error(f"{image}: {found}", found.kind, str(path))
            all_odd += found
        return all_odd


def _message(turn: Turn, has_images: bool) -> dict[str, Any]:
    """has_images: the record has any, so text that spells a placeholder needs a content list."""
    content: str | list[dict[str, str]]
    if has_images and turn.role == "user" and PLACEHOLDER.search(turn.text):
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.parts
        ]
    else:
        content = "".join(part if isinstance(part, str) else IMAGE_PLACEHOLDER for part in turn.parts)
    return {"role": turn.role, "content": content} | ({} if turn.loss is None else {"loss_mask": int(turn.loss)})


def _preparation(folder: Path) -> Preparation:
    """With the default settings of a recipe. Raises SettingError."""
    limits = PreprocessParameters()
    images = ImageProcessor.from_folder(folder, limits.image_min_pixels, limits.image_max_pixels)
    videos = VideoProcessor.from_folder(folder, limits)
    return Preparation(ChatTokenizer(folder), images, BasicParameters(""), Attr(), videos)
