"""Answers to the records of a data set: `python -m qwen35.inference.predict --help`.

Reads what training reads, whether or not a record ends with an answer, which the model never sees.
Writes a line of JSON for each record, in their order. Greedy, or by sampling (--sample).
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from qwen35.config.load import DATA, parse_dataset
from qwen35.console import outlive_readers
from qwen35.data import Record, RecordError
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.data_warnings import DataWarnings, Skipped
from qwen35.data.formats import read_records
from qwen35.data.mixture import dataset_files, dataset_name
from qwen35.data.preparation import Preparation
from qwen35.data.template import answer_text, has_thought
from qwen35.errors import USER_ERRORS, Parser, SettingError, complain
from qwen35.inference import load_model as models
from qwen35.inference.answers_file import appending, check_made_with, recorded, weights_digest
from qwen35.inference.generate import GREEDY, generate, is_thinking
from qwen35.inference.generation_config import FILE, add_sampling, read_generation_config, sampling_of, stop_ids
from qwen35.inference.sampling import Sampling
from qwen35.model import Qwen35, load_config
from qwen35.wording import number_of

ROOM_TO_THINK = 1024  # tokens added to the limit of an answer that begins with a thought
ROOM_TO_END = 4  # tokens for the white space after an answer, and for its end


@dataclass(frozen=True)
class Answer:
    record: Record
    text: str  # as `make generate` prints it, from `<think>` on if the prompt has opened a thought
    given: str  # with control tokens, without the thought
    wanted: str | None  # the record's own answer, without its thought; None: it has none
    is_cut: bool  # at the limit: nobody knows how it would have gone on

    def to_json(self) -> dict[str, Any]:
        thought, end, answer = self.text.rpartition("</think>")
        asked = next((turn.text for turn in reversed(self.record.turns) if turn.role != "assistant"), "")
        line: dict[str, Any] = {"record": self.record.source, "question": asked, "answer": answer.strip()}
        if end:
            line["thought"] = thought.removeprefix("<think>").strip()
        if self.wanted is not None and self.record.has_right_answer:
            line["label"] = self.wanted
        return line | ({"cut": True} if self.is_cut else {})


def without_thought(text: str) -> str:
    """The text after the thought. A thought that never ends stays, and makes the answer wrong."""
    return text.rpartition("</think>")[2].strip()


def has_answer(record: Record) -> bool:
    return record.turns[-1].role == "assistant"


@dataclass(frozen=True)
class Asking:
    """How a model is asked about records."""

    folder: str | Path  # with the config.json of the model
    preparation: Preparation
    sampling: Sampling = GREEDY
    thinking: bool | None = None  # whether prompts open a thought; None: as the record's own answer has one
    unanswered: bool = False  # the same of a record without an answer, where `thinking` is None

    def __str__(self) -> str:
        basic = self.preparation.basic
        if basic.template == "qwen3_vl_nothink":
            thoughts = "no thoughts"
        elif self.thinking is not None:
            thoughts = "an open thought" if self.thinking else "an empty thought"
        elif basic.enable_thinking is False:
            thoughts = "an empty thought (enable_thinking: false)"
        else:
            thoughts = "an open thought where the record's answer has one, else an empty one"
            thoughts += ", and an open one where it has no answer" * self.unanswered
        return f"asked with template {basic.template}, {thoughts}; {self.sampling}"

    def thinks(self, record: Record) -> bool:
        """Whether the prompt ends with an open thought. Raises RecordError."""
        if self.thinking is not None:
            return self.thinking
        return has_thought(record, self.preparation.style) if has_answer(record) else self.unanswered

    def answers(
        self,
        model: Qwen35,
        records: Sequence[Record],
        batch: int,
        max_new_tokens: int | None = None,
        skip: Callable[[RecordError], object] | None = None,
        done: int = 0,
    ) -> Iterator[list[Answer]]:
        """The model's answers to the records from number `done` on, `batch` records at once.

        max_new_tokens: None for the length of the batch's longest right answer, and room for
        thoughts. skip: called for a record whose images cannot be read; None: raise RecordError.
        Raises SettingError.
        """
        tokenizer, spec = self.preparation.tokenizer, vision_spec(self.folder)
        stop = stop_ids(self.folder, tokenizer)
        while done < len(records):
            end = done - done % batch + batch  # the same batches wherever an earlier run has stopped
            asked, prompts, longest = [], [], 0
            for record in records[done:end]:
                try:
                    thinks = self.thinks(record)
                    prompts.append(prompt_batch(record, self.preparation, spec, thinks))
                except RecordError as error:
                    if skip is None:
                        raise
                    skip(error)
                    continue
                wanted, room = self._wanted(record, thinks) if has_answer(record) else (None, 0)
                longest = max(longest, room)
                asked.append((record, wanted, "<think>\n" * thinks))
            limit = max_new_tokens or longest
            given = generate(model, prompts, limit, stop, self.sampling)
            found = []
            for (record, wanted, opening), ids in zip(asked, given, strict=True):
                text, shown = (opening + tokenizer.decode(ids, control) for control in (True, False))
                found.append(Answer(record, shown, without_thought(text), wanted, len(ids) == limit))
            yield found
            done = end

    def _wanted(self, record: Record, thinks: bool) -> tuple[str, int]:
        """The record's own answer, and how many tokens one as long may take."""
        turn, tokenizer = record.turns[-1], self.preparation.tokenizer
        right = tokenizer.encode_text(answer_text(turn, self.preparation.style), answer=True)
        thought = tokenizer.encode_text(turn.reasoning or "", answer=True)
        # decoded again: the tokenizer may normalize characters to another Unicode form
        wanted = without_thought(tokenizer.decode(right))
        return wanted, len(right) + ROOM_TO_END + (len(thought) + ROOM_TO_THINK if thinks else 0)


@dataclass(frozen=True)
class Questions:
    """The records of --data, and the model that is asked about them."""

    source: models.ModelSource
    asking: Asking
    records: list[Record]
    embedded: "TemporaryDirectory[str]"  # the images that records hold themselves; removed with this

    @classmethod
    def read(cls, args: argparse.Namespace, answered: bool) -> "Questions":
        """All records are measured and rendered, so that what is wrong with one is told at once.

        answered: each must end with an answer. Raises CheckpointError, SettingError, RecordError.
        """
        source, embedded = models.find_model(args.model, args.hf), TemporaryDirectory(prefix="qwen35-")
        dataset = parse_dataset(args.data)
        folders = list(dict.fromkeys(str(file.parent) for file in dataset_files(dataset)))
        basic: dict[str, Any] = {"dataset": dataset, "cache_dir": embedded.name}
        basic["dataset_dir"] = args.dataset_dir or folders[0]
        basic |= {"on_bad_record": args.on_bad_record} if args.on_bad_record else {}
        preparation = models.prepare(args, source, **basic)
        sampling = sampling_of(args, read_generation_config(source.config), args.sample)
        if args.sample and sampling.is_greedy:
            raise SettingError(f"--sample: {source.config}/{FILE} does not sample; give a --temperature")
        unanswered = not answered and is_thinking(args.thinking, preparation.basic, source.tokenizer)
        asking = Asking(source.config, preparation, sampling, args.thinking, unanswered)
        records = _read(asking, answered)
        if len(folders) > 1 and not args.dataset_dir and any(record.visuals for record in records):
            raise SettingError(
                f"the files of --data lie in {' and '.join(folders)}: give --dataset_dir, the folder of the images of all"
            )
        return cls(source, asking, records, embedded)

    def load_model(self, args: argparse.Namespace) -> Qwen35:
        """Raises CheckpointError, ConfigError, SettingError."""
        model = models.load_model(self.source)
        models.tell_sizes(args, self.source, self.asking.preparation, self.records)
        print(self.asking, file=sys.stderr)
        return model

    def answers(self, model: Qwen35, batch: int, limit: int | None, done: int = 0) -> Iterator[list[Answer]]:
        """`Asking.answers`, with a progress bar; what is left out is told at the end."""
        skipped = Skipped()
        skip = skipped.add if self.asking.preparation.basic.on_bad_record == "skip" else None
        shows = sys.stderr.isatty()
        with tqdm(None, "answers", len(self.records), False, unit=" records", initial=done, disable=not shows) as bar:
            for found in self.asking.answers(model, self.records, batch, limit, skip, done):
                yield found
                bar.update(len(found))
        _tell(skipped)


def _read(asking: Asking, answered: bool) -> list[Record]:
    """Raises SettingError, RecordError."""
    preparation, skipped, warnings = asking.preparation, Skipped(), DataWarnings()
    basic, images = preparation.basic, preparation.folder()
    skip = skipped.add if basic.on_bad_record == "skip" else None
    read = (read_records(f, of.attr, images, None, answered, skip, warnings) for f, of in preparation.files())
    records = []
    for record in chain.from_iterable(read):
        odd: list[str] = []
        try:
            preparation.measure(record, odd)
            preparation.prompt(record, asking.thinks(record))
        except RecordError as error:
            if skip is None:
                hint = f"; --dataset_dir says where, now {basic.dataset_dir}" if error.kind.endswith(" missing") else ""
                raise RecordError(f"{error}{hint}", error.kind, error.image) from None
            skip(error)
            continue
        for kind in odd:
            warnings.count(kind, 1, record.source)
        records.append(record)
    _tell(skipped, warnings.lines())
    if answered and (left := [record for record in records if not record.has_right_answer]):
        what = f"{len(left)} of {number_of(len(records), 'record')}: the loss mask leaves the last answer out"
        if len(left) == len(records):
            raise RecordError(f"nothing is asked of {what}")
        print(f"data: not asked: {what}; first: {left[0].source}", file=sys.stderr)
        records = [record for record in records if record.has_right_answer]
    if not records:
        raise RecordError(f"{dataset_name(basic.dataset)}: no records" + " left" * bool(skipped))
    return records


def _tell(skipped: Skipped, warnings: Sequence[str] = ()) -> None:
    for line in ([f"skipped {len(skipped):,}: {skipped}"] if skipped else []) + [*warnings]:
        print(f"data: {line}", file=sys.stderr)


# -- the command -----------------------------------------------------------------------------------


def add_questions(parser: Parser, data: str, limit: str, thinking: str = "") -> None:
    """Options for the model, the records, and how it is asked about them."""
    models.add_options(parser)
    add = parser.add_argument
    add("--data", required=True, help=f"{data}; {DATA}")
    add("--dataset_dir", help="folder of the records' images and videos; default: the folder of the files")
    bad = "what to do with a record that cannot be used; default: the run's or recipe's, else error"
    add("--on_bad_record", choices=["error", "skip"], help=bad)
    add("--batch", type=models.positive, default=64, help="records answered at once; default: 64")
    add("--max_new_tokens", type=models.positive, help=f"default: {limit}")
    models.add_thinking(parser, f"open where the record's answer has a thought, else empty{thinking}")
    sample = f"sample as the model's {FILE} says; default: greedy, with its penalties"
    add("--sample", action="store_true", help=sample)
    add_sampling(parser, "with --sample")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m qwen35.inference.predict", description=__doc__)
    thinking = "; without an answer as in `make generate`"
    add_questions(parser, "records as for training", f"the model's {FILE}, else 512", thinking)
    parser.add_argument("--out", type=Path, required=True, help="file to write; the same command completes it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args, cut = parse(arguments), 0
    try:
        if args.seed is None:  # an interrupted run goes on with the seed that it drew
            args.seed = recorded(args.out).get("seed")
        questions = Questions.read(args, answered=False)
        limit = args.max_new_tokens or read_generation_config(questions.source.config).get("max_new_tokens", 512)
        made_with = _made_with(questions.asking, limit)
        check_made_with(args.out, made_with)
        model = questions.load_model(args)
        sources = [record.source for record in questions.records]
        with appending(args.out, made_with | {"weights": weights_digest(model)}, sources) as (done, write):
            for found in questions.answers(model, args.batch, limit, done):
                write([answer.to_json() for answer in found])
                cut += sum(answer.is_cut for answer in found)
    except USER_ERRORS as error:
        return complain(error)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command completes {args.out}", file=sys.stderr)
        return 130
    more = f", {done:,} of them before" * (done > 0) + f"; cut at max_new_tokens {limit}: {cut:,}" * (cut > 0)
    print(f"{args.out}: asked about {number_of(len(sources), 'record')}{more}")
    return 0


def _made_with(asking: Asking, limit: int) -> dict[str, Any]:
    """What the answers depend on beside the weights."""
    preparation, sampling = asking.preparation, dict(vars(asking.sampling))
    if asking.sampling.is_greedy:
        del sampling["seed"]
    pixels = {f"image_{name}": getattr(preparation.images, name, None) for name in ("min_pixels", "max_pixels")}
    config = asdict(load_config(asking.folder))  # which the weights do not show
    told: dict[str, Any] = {"config.json": hashlib.sha256(repr(config).encode()).hexdigest()[:16]}
    told |= {"template": preparation.basic.template, "max_new_tokens": limit, "thinking": asking.thinking}
    files = {str(file): one.cache_key(file, None) for file, one in preparation.files()}
    return told | pixels | sampling | {"records": files}


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
