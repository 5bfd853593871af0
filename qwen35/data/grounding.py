"""Grounding records in ms-swift's form: `objects` beside the turns has names and boxes.

`<ref-object>` and `<bbox>` in the texts, each in order, stand for them. Coordinates are written in
thousandths of the image's width and height, as Qwen3-VL and its successors have them: they hold for
an image of any size, so for a resized one, too.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen35.data.content import kind, text
from qwen35.data.fields import is_nothing
from qwen35.data.image_processor import ImageError, upright_size
from qwen35.data.record import Record, RecordError, Turn
from qwen35.wording import number_of

REF, BOX = "<ref-object>", "<bbox>"
TAG = re.compile(f"({REF}|{BOX})")
KEYS = ("ref", "bbox", "image_id", "bbox_type")  # the first three are lists
IN_JSON = re.compile(rf'_2d"\s*:\s*{BOX}')  # as Qwen3-VL's own answers have it


def literal_tags(record: Record) -> int:
    """How many of these placeholders a record without `objects` spells out, calls included."""
    count = 0
    for turn in record.turns:
        for part in (turn.reasoning, *turn.parts, *(str(call.arguments) for call in turn.tool_calls)):
            if isinstance(part, str) and (BOX in part or REF in part):
                count += len(TAG.findall(part))
    return count


def with_objects(record: Record, raw: Any, where: str, bbox_format: str) -> Record:
    """The record with its texts' placeholders filled from `objects`. Raises RecordError."""
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: is {kind(raw)}, not an object with ref and bbox")
    if unknown := [key for key in raw if key not in KEYS and not is_nothing(raw[key])]:
        raise RecordError(f"{where}: has {unknown[0]!r}, which is not read; it may have {', '.join(KEYS)}")
    refs, boxes, ids = (raw.get(key) or [] for key in KEYS[:3])
    for key, value in zip(KEYS, (refs, boxes, ids), strict=False):
        if not isinstance(value, list):
            raise RecordError(f"{where}.{key}: is {kind(value)}, not a list")
    texts = [part for turn in record.turns for part in (turn.reasoning, *turn.parts) if isinstance(part, str)]
    for tag, given, key in ((REF, refs, "ref"), (BOX, boxes, "bbox")):
        if (count := sum(part.count(tag) for part in texts)) != len(given):
            raise RecordError(f"{where}.{key}: has {len(given)}, but {count} {tag} stand in the turns; each takes one")
    if ids and (len(ids) != len(boxes) or any(type(number) is not int for number in ids)):
        raise RecordError(f"{where}.image_id: is not a list of {number_of(len(boxes), 'number')}, one for each box")
    if bbox_format == "legacy" and any(map(IN_JSON.search, texts)):
        raise RecordError(f'{where}: "bbox_2d": {BOX} in a text is JSON only with attr.bbox_format: new')
    names = [text(ref, f"{where}.ref[{i}]") for i, ref in enumerate(refs)]
    ids = ids or [0] * len(boxes)
    box_type = raw.get("bbox_type") or "real"
    sizes = {number: _size(record.images, number, box_type, where) for number in dict.fromkeys(ids)}
    points = [_thousandths(box, sizes[ids[i]], f"{where}.bbox[{i}]") for i, box in enumerate(boxes)]
    if bbox_format == "new":
        fills = {REF: iter(names), BOX: map(str, points)}
    else:
        pairs = (",".join(f"({x},{y})" for x, y in zip(box[::2], box[1::2], strict=True)) for box in points)
        fills = {
            REF: (f"<|object_ref_start|>{name}<|object_ref_end|>" for name in names),
            BOX: (f"<|box_start|>{pair}<|box_end|>" for pair in pairs),
        }
    return replace(record, turns=tuple(_filled(turn, fills) for turn in record.turns))


def _filled(turn: Turn, fills: dict[str, Iterator[str]]) -> Turn:
    def fill(part: Any) -> Any:
        return TAG.sub(lambda match: next(fills[match[0]]), part) if isinstance(part, str) else part

    reasoning = fill(turn.reasoning)  # which comes before the content
    content = fill(turn.content) if isinstance(turn.content, str) else tuple(map(fill, turn.content))
    return replace(turn, reasoning=reasoning, content=content)


def _size(images: Sequence[Path], number: int, box_type: Any, where: str) -> tuple[int, int]:
    """(width, height) of the upright image in the units of its boxes. Raises RecordError."""
    if box_type not in ("real", "norm1"):
        raise RecordError(f"{where}.bbox_type: {repr(box_type)[:80]} is neither real nor norm1")
    if not 0 <= number < len(images):
        raise RecordError(
            f"{where}: a box is in image {number}, from 0, of a record with {number_of(len(images), 'image')}"
        )
    try:
        return (1, 1) if box_type == "norm1" else upright_size(images[number])
    except ImageError as error:
        raise RecordError(f"{where}: image {images[number]}: {error}", error.kind, str(images[number])) from None


def _thousandths(box: Any, size: tuple[int, int], where: str) -> list[int]:
    """A box in thousandths of the width and height of its image. Raises RecordError."""
    if not isinstance(box, list) or any(isinstance(n, bool) or not isinstance(n, int | float) for n in box):
        raise RecordError(f"{where}: is {kind(box)}, not a list of numbers")
    where = f"{where}: {str(box)[:80]}"
    if len(box) not in (2, 4):
        raise RecordError(f"{where} is neither a point x, y nor two corners x1, y1, x2, y2")
    if len(box) == 4 and (box[2] < box[0] or box[3] < box[1]):
        raise RecordError(f"{where}: its second corner is left of the first or above it; write x1, y1, x2, y2")
    what = "0..1, as bbox_type: norm1 has it" if size == (1, 1) else f"its image of {size[0]} x {size[1]} pixels"
    scaled = [value / most for value, most in zip(box, size * 2, strict=False)]
    if not all(0 <= value <= 1 for value in scaled):
        raise RecordError(f"{where} lies outside of {what}", "box outside of its image")
    if size != (1, 1) and max(box) <= 1 and any(value % 1 for value in box):
        raise RecordError(f"{where} lies within one pixel of {what}; relative boxes have bbox_type: norm1")
    return [round(value * 1000) for value in scaled]
