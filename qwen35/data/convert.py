"""LLaVA-Instruct and the images of COCO -> training records.

A JSON list of {"images": ["./train2017/X.jpg"], "messages": [{"role": "user", "content": …}, …]}.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen35.data.fields import FieldNames
from qwen35.data.files import replacing
from qwen35.data.folder import ImageFolder
from qwen35.data.formats import parse_record
from qwen35.data.reading import read_values
from qwen35.data.record import Record, RecordError
from qwen35.errors import SettingError

NAMED = 5  # missing images that a message names


@dataclass
class Converted:
    records: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # images of records left out


def convert(llava: Path, images: Path, out: Path, on_missing: str = "error") -> str:
    """Write `out`, whole or not at all, and return a report. `dataset_dir` for it is the folder above `images`.

    on_missing: "error", or "skip" to leave out records whose image file is not there.
    Raises SettingError for folders and files, RecordError for a record that cannot be used.
    """
    if not llava.is_file():
        raise SettingError(f"{llava}: no such file; set LLAVA to llava_instruct_150k.json")
    if not images.is_dir():
        raise SettingError(f"{images}: no such folder; set IMAGES to the folder of the images, e.g. …/train2017")
    if out.exists() and out.samefile(llava):
        raise SettingError(f"{out}: is the file that is read; set OUT to another")
    converted = _convert_all(llava, images)
    n = len(converted.missing)
    named = ", ".join(converted.missing[:NAMED]) + (", …" if n > NAMED else "")
    if n and on_missing == "error":
        raise RecordError(
            f"{llava}: {n:,} image{'s' * (n > 1)} not in {images}: {named}; --on_missing skip leaves such records out"
        )
    if not converted.records:
        raise RecordError(f"{llava}: no records" + (f" left: no image is in {images}: {named}" if n else ""))
    _write(converted.records, out)
    turns = sum(len(record["messages"]) for record in converted.records)
    used = sum(len(record["images"]) for record in converted.records)
    report = f"{out}: {len(converted.records):,} records, {turns:,} turns, {used:,} images"
    if n:
        report += f"\nleft out: {n:,} record{'s' * (n > 1)} whose image is not in {images}: {named}"
    return report + f"\nfor training: dataset={out}, dataset_dir={Path(os.path.realpath(images)).parent}"


def _convert_all(llava: Path, images: Path) -> Converted:
    converted = Converted()
    names, folder = FieldNames.llava(), ImageFolder(images)
    name = Path(os.path.realpath(images)).name
    raws = tqdm(read_values(llava), desc="convert", unit=" records", disable=not sys.stderr.isatty(), leave=False)
    for number, raw in enumerate(raws, 1):
        record = parse_record(raw, f"{llava}, record {number}", names, folder)
        absent = [path for path in record.images if not path.is_file()]
        if absent:
            converted.missing.append(Path(os.path.relpath(absent[0], folder.real_root)).as_posix())
        else:
            converted.records.append(_as_messages(record, folder, name))
    return converted


def _as_messages(record: Record, folder: ImageFolder, name: str) -> dict[str, Any]:
    below = [Path(os.path.relpath(path, folder.real_root)).as_posix() for path in record.images]
    return {
        "images": [f"./{name}/{path}" for path in below],
        "messages": [{"role": turn.role, "content": turn.content} for turn in record.turns],
    }


def _write(records: list[dict[str, Any]], out: Path) -> None:
    """A JSON list, one record a line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    try:
        with replacing(out) as temporary:
            temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    except OSError as error:
        raise SettingError(f"{out}: cannot be written: {error.strerror}") from None
