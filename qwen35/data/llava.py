"""LLaVA-Instruct and the images of COCO -> training records.

A JSON list of {"images": ["./train2017/X.jpg"], "messages": [{"role": "user", "content": …}, …]}, and beside it a report.
Several processes read the records and the headers of their images; only a few thousand records are in memory at a time.
"""

import json
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data.data_warnings import RecordWarnings
from qwen35.data.fields import FieldNames
from qwen35.data.files import replacing
from qwen35.data.folder import ImageFolder
from qwen35.data.formats import parse_record
from qwen35.data.image_processor import ImageError, ImageProcessor, upright_size
from qwen35.data.in_order import in_order
from qwen35.data.readers import read_values
from qwen35.data.record import IMAGE_PLACEHOLDER, PLACEHOLDER, Record, RecordError, Turn
from qwen35.data.special_tokens import Spelled
from qwen35.data.tally import Tally
from qwen35.data.tokenized import Preparation
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VideoProcessor
from qwen35.errors import SettingError, visible
from qwen35.wording import number_of

NAMED = 5  # missing images that a message names
CHUNK = 512  # records that a process gets at once
MISSING = "image missing"

Jobs = tuple[int, list[Any]]  # the number of the first, from 1, and the values of the file


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


@dataclass(frozen=True)
class Converted:
    line: str  # JSON
    turns: int
    images: int
    length: int
    warnings: RecordWarnings | None
    source: str
    spelled: Spelled


def convert(options: Options) -> str:
    """Write `out`, whole or not at all, then its report; return that. `dataset_dir` for it is the folder above `images`.

    Raises SettingError for folders and files, RecordError for a record that cannot be used and is not to be skipped.
    """
    llava, images, out = options.llava, options.images, options.out
    if not llava.is_file():
        raise SettingError(f"{llava}: no such file; set LLAVA to llava_instruct_150k.json")
    if not images.is_dir():
        raise SettingError(f"{images}: no such folder; set IMAGES to the folder of the images, e.g. …/train2017")
    if out.exists() and out.samefile(llava):
        raise SettingError(f"{out}: is the file that is read; set OUT to another")
    if options.tokenizer is not None and options.check == "none":
        raise SettingError("--tokenizer counts the tokens of images, so their headers are read: leave out --check none")
    llava.open("rb").close()  # a file that may not be read is named as itself, below
    tally = Tally("characters" if options.tokenizer is None else "tokens")
    try:
        with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.write("[\n")
            with closing(_lines(options, tally)) as lines:
                stream.writelines(lines)
            stream.write("\n]\n")
        report = _report(options, tally)
        files = tally.write(report, out)
    except OSError as error:
        raise SettingError(f"{out}: cannot be written: {error.strerror}") from None
    return f"{report}\nthis report: {files[0]}, {files[1]}"


def _lines(options: Options, tally: Tally) -> Generator[str, None, None]:
    """Raises RecordError."""
    missing: list[str] = []
    separator = ""
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    bar = tqdm(desc="convert", unit=" records", disable=not sys.stderr.isatty(), leave=False)
    with bar, closing(in_order(partial(Converter, options), _jobs(options), workers)) as parts:
        for part in parts:
            for made in part:
                bar.update()
                if isinstance(made, Converted):
                    tally.add(made.turns, made.images, made.length)
                    if made.warnings is not None:
                        tally.warnings.add(made.warnings)
                    tally.special_tokens.add(made.source, made.spelled)
                    yield separator + made.line
                    separator = ",\n"
                elif options.tolerates(made):
                    tally.skip(made)
                elif made.kind == MISSING:  # all of them are told at once
                    missing.append(_below(options, made.image or ""))
                else:
                    raise RecordError(f"{made}; --on_bad_record skip leaves such records out", made.kind, made.image)
    if missing:
        n = len(missing)
        raise RecordError(
            f"{options.llava}: {number_of(n, 'image')} not in {options.images}: {_names(missing)}; "
            "--on_missing skip leaves such records out"
        )
    if not tally.records:
        raise RecordError(f"{options.llava}: no records" + (f" left: {tally.skipped}" if tally.named else ""))


def _jobs(options: Options) -> Iterator[Jobs]:
    values, first = read_values(options.llava, lenient=options.on_bad_record == "skip"), 1
    while chunk := list(islice(values, CHUNK)):
        yield first, chunk
        first += len(chunk)


def _report(options: Options, tally: Tally) -> str:
    out, skipped = options.out, tally.skipped
    lines = [f"{out}: {tally.records:,} records, {tally.turns:,} turns, {tally.images:,} images"]
    if n := skipped.kinds.get(MISSING, 0):
        gone = [image for image, state in skipped.images.items() if state == "missing"]
        named = [_below(options, image) for image in gone]
        lines.append(f"left out: {number_of(n, 'record')} whose image is not in {options.images}: {_names(named)}")
    if len(skipped) > n:
        lines.append(f"left out: {len(skipped):,} records in all: {skipped}")
    if options.check == "none":
        lines.append("the images were not looked at (--check none)")
    lines += tally.warnings.lines("LLaVA's field is image") + tally.special_tokens.lines()
    lines.append(tally.histogram())
    if options.tokenizer is None:
        lines.append("for tokens instead of characters name a model folder: make data HF=…")
    lines.append(f"for training: dataset={out}, dataset_dir={Path(os.path.realpath(options.images)).parent}")
    return visible("\n".join(lines), keep="\n")


def _below(options: Options, image: str) -> str:
    return os.path.relpath(image, os.path.realpath(options.images))


def _names(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


class Converter:
    """What a process does with a stretch of the file."""

    def __init__(self, options: Options):
        """Raises SettingError."""
        self._options, self._names = options, FieldNames.llava()
        self._folder = ImageFolder(options.images)
        self._root = f"{self._folder.real_root}/"
        self._prefix = f"./{self._folder.real_root.name}/"
        self._verdicts: dict[Path, ImageError | None] = {}  # the same image serves several records
        self._preparation = None if options.tokenizer is None else _preparation(options.tokenizer)

    def __call__(self, job: Jobs) -> list[Converted | RecordError]:
        return [self._one(raw, number) for number, raw in enumerate(job[1], job[0])]

    def _one(self, raw: Any, number: int) -> Converted | RecordError:
        if isinstance(raw, RecordError):
            return raw
        try:
            record, warnings = parse_record(raw, f"{self._options.llava}, record {number}", self._names, self._folder)
            if record.videos or any(turn.reasoning or turn.tool_calls for turn in record.turns):
                raise record.error(
                    "has videos, thoughts or calls of tools, which LLaVA's records have not; use it as it is"
                )
            spelled: Spelled = {}
            if self._preparation is not None:
                sample = self._preparation.tokenise(record)
                length, spelled = len(sample.ids), sample.spelled
            else:
                if self._options.check == "headers":
                    self._check(record)
                length = sum(len(turn.text) for turn in record.turns) + len(IMAGE_PLACEHOLDER) * len(record.images)
        except RecordError as error:
            return error
        messages = [_message(turn, shows=bool(record.images)) for turn in record.turns]
        images = [self._prefix + str(path).removeprefix(self._root) for path in record.images]
        line = json.dumps({"images": images, "messages": messages}, ensure_ascii=False)
        return Converted(line, len(messages), len(images), length, warnings, record.source, spelled)

    def _check(self, record: Record) -> None:
        """Raises RecordError."""
        for number, path in enumerate(record.images, 1):
            if path not in self._verdicts:
                self._verdicts[path] = _verdict(path)
            if (error := self._verdicts[path]) is not None:
                which = f"image {number} of {len(record.images)}, {path}"
                raise record.error(f"{which}: {error}", error.kind, str(path))


def _message(turn: Turn, shows: bool) -> dict[str, Any]:
    """shows: the record has images; what is text there, and spells a placeholder, can only be said in a list."""
    content: str | list[dict[str, str]]
    if shows and turn.role == "user" and PLACEHOLDER.search(turn.text):
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.parts
        ]
    else:
        content = "".join(part if isinstance(part, str) else IMAGE_PLACEHOLDER for part in turn.parts)
    return {"role": turn.role, "content": content} | ({} if turn.loss is None else {"loss_mask": int(turn.loss)})


def _verdict(path: Path) -> ImageError | None:
    try:
        upright_size(path)
    except ImageError as error:
        return error
    return None


def _preparation(folder: Path) -> Preparation:
    """With the default settings of a recipe. Raises SettingError."""
    limits = PreprocessParameters()
    images = ImageProcessor.from_folder(folder, limits.image_min_pixels, limits.image_max_pixels)
    videos = VideoProcessor.from_folder(folder, limits)
    return Preparation(ChatTokenizer(folder), images, BasicParameters(""), Attr(), videos)
