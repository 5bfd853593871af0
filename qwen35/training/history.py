"""What a run's page shows beyond the metrics: `<save>/run.json`, which rank 0 writes.

The starts of the run and their reasons, what it runs on, its data with the first samples as the
model gets them, and answers of validations.
"""

import base64
import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qwen35.batch import IGNORE
from qwen35.checkpoint.folders import write_atomic
from qwen35.config.schema import Settings
from qwen35.data import MicroBatches, RecordError
from qwen35.data.preview import marked
from qwen35.errors import read_object
from qwen35.inference.evaluate import is_right
from qwen35.inference.predict import Answer
from qwen35.rank import RESTART, RESTART_REASON
from qwen35.training.metrics import RunError
from qwen35.training.trackers import Tracker, open_trackers

FILE = "run.json"
SHOWN = 3  # samples
MOST_ANSWERS = 6  # shown of each validation
MOST_VALIDATIONS = 20  # whose answers are kept
MARKS = ("\x02", "\x03")  # around trained text; in a sample's own text these characters are spelled out
WIDTH = 320  # of a picture, at most
BINS = 40  # of the lengths' histogram


class Shown(NamedTuple):
    """A sample as the model gets it."""

    title: str
    text: str  # with MARKS around what is trained
    images: list[Image.Image]


def first_samples(batches: MicroBatches) -> list[Shown]:
    """Of the first packed sequences, without those whose images are broken."""
    dataset, shown = batches.dataset, []
    first = [unit for packed in batches.packed_sequences.epoch(0)[:SHOWN] for unit in packed][:SHOWN]
    for index in (i for unit in first for i in dataset.samples_of(unit)):
        try:
            sample = dataset[index]
        except RecordError:  # the step that takes it says so
            continue
        ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
        trained = [False, *(label != IGNORE for label in labels[:-1])]
        title = f"{dataset.source(index)}: {len(ids)} tokens, {sum(trained)} trained"
        text = marked(dataset.preparation.tokenizer, ids, trained, MARKS)
        shown.append(Shown(title, text, [*map(Image.fromarray, dataset.pictures(index, sample))]))
    return shown


def begin_history(settings: Settings, step: int, steps: int, runs_on: str, batches: MicroBatches) -> list[Tracker]:
    """Note a start of the run, and open its trackers, which get the samples. For rank 0.

    runs_on: devices, arithmetic, parameters, as the log has them.
    """
    folder, dataset, shown = Path(settings.training.save), batches.dataset, first_samples(batches)
    facts = read_facts(folder) if step else {}
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "step": step,
        "restart": int(os.environ.get(RESTART, "0")),
        "reason": os.environ.get(RESTART_REASON, ""),
    }
    counts, edges = np.histogram(dataset.lengths, BINS)
    facts = {
        "starts": [*facts.get("starts", []), start],
        "answers": [entry for entry in facts.get("answers", []) if entry["step"] <= step],
        "steps": steps,
        "runs_on": runs_on,
        "data": batches.report(),
        "files": [[str(samples.file), size] for samples, size in zip(dataset.files, dataset.sizes, strict=True)],
        "lengths": {"counts": counts.tolist(), "edges": edges.tolist(), "unit": dataset.unit},
        "samples": [{"title": s.title, "text": s.text, "images": [*map(_data_uri, s.images)]} for s in shown],
    }
    write_atomic(folder / FILE, json.dumps(facts))
    trackers = open_trackers(settings, folder, step)
    for tracker in trackers:
        for number, sample in enumerate(shown if not step else ()):
            text = sample.text.replace(MARKS[0], "[[").replace(MARKS[1], "]]")
            tracker.show(step, f"samples/{number}", f"{sample.title}\n{text}", sample.images)
    return trackers


def note_answers(folder: Path, step: int, answers: Sequence[Answer], trackers: Sequence[Tracker]) -> None:
    """Add the first answers of a validation; those of old ones beyond the limit go."""
    if not answers:
        return
    text = "\n".join(f"{a.record.source}: {a.given!r}, right is {a.wanted!r}" for a in answers)
    for tracker in trackers:
        tracker.show(step, "answers", text, [])
    facts = read_facts(folder)
    kept = [{"source": a.record.source, "wanted": a.wanted, "given": a.given, "is_right": is_right(a)} for a in answers]
    before = facts.get("answers", [])[1 - MOST_VALIDATIONS :]
    write_atomic(folder / FILE, json.dumps(facts | {"answers": [*before, {"step": step, "answers": kept}]}))


def read_facts(folder: Path) -> dict[str, Any]:
    """Empty for a run that has none, since it began before there was one. Raises RunError."""
    return read_object(folder / FILE, RunError) if (folder / FILE).exists() else {}


def _data_uri(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((WIDTH, WIDTH))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
