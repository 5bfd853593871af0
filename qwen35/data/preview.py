"""Prints samples of a recipe as they are trained, with the trained tokens marked (`make show`).

Or how long all of them are (`make show ARGS=--lengths`, `make data DATA=…`).
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from qwen35.config.schema import Settings, dataset_entries
from qwen35.data.chat_template import describe
from qwen35.data.collator import check_agreement, vision_spec
from qwen35.data.data_warnings import DataWarnings, Skipped
from qwen35.data.files import replacing
from qwen35.data.histogram import draw, histogram
from qwen35.data.mixture import dataset_files, dataset_name
from qwen35.data.preparation import Preparation
from qwen35.data.record import RecordError
from qwen35.data.template import IMAGE_PAD, VIDEO_PAD
from qwen35.data.tokenized import load_files, tokenised
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.truncation import truncate
from qwen35.errors import visible
from qwen35.wording import number_of, number_of_visuals

COLOUR = ("\x1b[32m", "\x1b[0m")  # green
BRACKETS = ("[[", "]]")
TOO_LONG = {"error": "refused by training", "drop": "left out", "truncate": "cut"}  # by `truncation`
BOUNDARY = "¦"  # between the tokens of text that spells a special token but is not one


def _preparation(settings: Settings) -> Preparation:
    """Raises SettingError."""
    preparation, folder = Preparation.of(settings), settings.model.model_name_or_path
    check_agreement(folder, settings.tokenizer_dir, preparation, vision_spec(folder))
    return preparation


def show(settings: Settings, samples: int, colour: bool) -> Iterator[str]:
    """The first samples, one text each, and warnings. Raises SettingError, RecordError.

    Samples that training would refuse are shown first, and reported as an error at the end.
    """
    preparation = _preparation(settings)
    basic = preparation.basic
    marks = COLOUR if colour else BRACKETS
    template = describe(settings.tokenizer_dir, preparation.style)
    yield f"template {template}; trained tokens are {'green' if colour else 'in [[ ]]'}"
    left_out: list[RecordError] = []
    skip = left_out.append if basic.on_bad_record == "skip" else None
    warnings = DataWarnings()
    files = zip(dataset_files(basic.dataset), map(preparation.of_file, dataset_entries(basic.dataset)), strict=True)
    records = chain.from_iterable(tokenised(*file, None, skip, warnings) for file in files)
    everything = (parts for _, parts in islice(records, basic.max_samples))
    units = everything if preparation.pairs else ([part] for parts in everything for part in parts)
    shown = refused = 0
    for unit in islice(units, samples):
        yield from _left_out_lines(left_out)
        shown += 1
        tokens, kept, too_long = sum(len(sample.ids) for _, sample in unit), None, ""
        if tokens > basic.cutoff_len:
            too_long = (
                f", {tokens} with the other answer" * preparation.pairs + f", MORE THAN cutoff_len {basic.cutoff_len}"
            )
            if basic.truncation == "truncate":
                ((_, sample),) = unit
                grids = np.array(sample.grids, dtype=np.int64).reshape(-1, 3)
                kept, _ = truncate(sample.ids, sample.loss_mask, grids, basic.cutoff_len, preparation.tokenizer)
                too_long += f", cut to {kept}" if kept else ", left out: nothing trained is left"
            elif skip or basic.truncation == "drop":
                too_long += ", left out"
            else:
                refused += 1
        for record, sample in unit:
            ids, mask = sample.ids[: kept or None].tolist(), sample.loss_mask[: kept or None].tolist()
            head = f"{record.source}: {len(sample.ids)} tokens{too_long}, {sum(mask)} trained, "
            head += number_of_visuals(len(record.images), len(record.videos))
            text = marked(preparation.tokenizer, ids, mask, marks)
            yield f"--- {visible(head)}\n{text}"
    yield from _left_out_lines(left_out)
    lines = warnings.lines()
    if {"control", "text"} & warnings.counts.keys():
        lines.append(f"these characters are shown with {BOUNDARY} between their tokens")
    if lines:
        yield "\n".join(["--- of the records shown:", *lines])
    if not shown:
        raise RecordError(f"{dataset_name(basic.dataset)}: no records" + " left" * bool(skip))
    if refused:
        limit_name = f"data.dataset_param.basic_parameters.cutoff_len = {basic.cutoff_len}"
        raise RecordError(
            f"{dataset_name(basic.dataset)}: of the {number_of(shown, preparation.unit)} shown, {refused:,} "
            f"{'is' if refused == 1 else 'are'} longer than {limit_name}, which training refuses; truncation: drop leaves "
            f"such records out{'' if preparation.pairs else ', truncate cuts them'}"
        )


def lengths_report(settings: Settings, picture: Path | None = None) -> str:
    """Read as for training, into cache_dir if that is set. Raises SettingError, RecordError."""
    preparation = _preparation(settings)
    basic, name = preparation.basic, dataset_name(preparation.basic.dataset)
    unit = "tokens per pair, both answers with the prompt" if preparation.pairs else "tokens per sample"
    skipped, warnings = Skipped(), DataWarnings()
    with tqdm(desc="lengths", unit=" records", disable=not sys.stderr.isatty(), leave=False) as bar:
        files = list(load_files(preparation, lambda _, count: bar.update(count)))
    for samples in files:
        skipped.update(samples.skipped)
        warnings.update(samples.warnings)
    width = 2 if preparation.pairs else 1
    lengths = np.concatenate([samples.offsets[::width].diff().numpy() for samples in files])
    records = sum(samples.records for samples in files)
    if not len(lengths):
        raise RecordError(f"{name}: no records" + f" left: {skipped}" * bool(skipped))
    lines = [f"{name}: {number_of(records, 'record')}, {number_of(len(lengths), preparation.unit)}"]
    lines += [f"skipped {len(skipped):,}: {skipped}"] * bool(skipped)
    lines += [*warnings.lines(), histogram(lengths, unit, basic.cutoff_len)]
    if lengths.max() > basic.cutoff_len:
        is_left_out = basic.truncation == "error" and basic.on_bad_record == "skip"
        what = TOO_LONG["drop" if is_left_out else basic.truncation]
        lines.append(f"those longer than cutoff_len are {what} (truncation: {basic.truncation})")
    if picture:
        with replacing(picture) as temporary:
            draw(lengths, unit, name, temporary, basic.cutoff_len)
        lines.append(f"picture written to {picture}")
    return visible("\n".join(lines), keep="\n")


def _left_out_lines(left_out: list[RecordError]) -> Iterator[str]:
    while left_out:
        yield f"--- left out: {left_out.pop(0)}"


def marked(tokenizer: ChatTokenizer, ids: Sequence[int], loss_mask: Sequence[bool], marks: tuple[str, str]) -> str:
    """ids [T] as text, with trained stretches between the marks and image tokens counted."""
    out = []
    pads = {tokenizer.image_id: IMAGE_PAD, tokenizer.video_id: VIDEO_PAD}
    kinds = [(mask, pads.get(token), token) for token, mask in zip(ids, loss_mask, strict=True)]
    for (is_trained, pad), run in groupby(kinds, key=lambda kind: kind[:2]):
        stretch = [token for *_, token in run]
        text = f"{pad}*{len(stretch)}" if pad else visible(_text(tokenizer, stretch), keep="\n\t\u200c\u200d")
        out.append(f"{marks[0]}{text}{marks[1]}" if is_trained else text)
    return "".join(out)


def _text(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    """ids [T] as text, with BOUNDARY inside text that spells a special token but is not one."""
    out = []
    for is_special, run in groupby(ids, key=tokenizer.is_special):
        stretch = list(run)
        text = tokenizer.decode(stretch)
        spelled = [] if is_special else tokenizer.special_in(text)
        out.append(_bounded(tokenizer, stretch, spelled) if spelled else text)
    return "".join(out)


def _bounded(tokenizer: ChatTokenizer, ids: Sequence[int], spelled: Sequence[tuple[int, int]]) -> str:
    """ids [T] as text, with BOUNDARY between the tokens inside the spans `spelled`."""
    out: list[str] = []
    pending: list[int] = []
    position = 0
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd"):  # not in the middle of a character
            out.append(BOUNDARY * any(start < position < end for start, end in spelled) + text)
            position += len(text)
            pending = []
    return "".join(out) + tokenizer.decode(pending)
