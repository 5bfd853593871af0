"""How often a model answers held-out records right: `python -m qwen35.inference.evaluate --model DIR --data FILE`.

The last answer of each record is left to the model, which takes the likeliest token each time (--sample: draws). Right is what
spells the same, thoughts and white space at the ends aside. Tool calls are compared as the chat template writes them below
the answer's text, so their order counts, and that of their arguments.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from qwen35.config.schema import BasicParameters
from qwen35.console import outlive_readers
from qwen35.data import Record, RecordError
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.formats import read_records
from qwen35.data.mixture import dataset_files, dataset_name
from qwen35.data.template import answer_text, has_thought
from qwen35.data.tokenized import Preparation
from qwen35.errors import USER_ERRORS, Parser, SettingError, complain
from qwen35.inference.generate import generate
from qwen35.inference.generation_config import FILE, add_sampling, read_generation_config, sampling_of, stop_ids
from qwen35.inference.load_model import add_options, add_thinking, find_model, load_model, positive, prepare
from qwen35.inference.sampling import Sampling
from qwen35.model import Qwen35

ROOM_TO_THINK = 1024  # tokens that an answer with a thought may take beyond the record's own
GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    record: Record
    wanted: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given == self.wanted


def read_all(preparation: Preparation) -> list[Record]:
    """The records of preparation.basic.dataset, their images measured. Raises SettingError, RecordError."""
    basic = preparation.basic
    files, images = dataset_files(basic.dataset), preparation.folder()
    warnings = DataWarnings()
    read = (read_records(file, preparation.attr, images, warnings=warnings) for file in files)
    records = list(chain.from_iterable(read))
    if not records:
        raise RecordError(f"{dataset_name(basic.dataset)}: no records")
    for line in warnings.lines():
        print(f"data: {line}", file=sys.stderr)
    for record in records:
        try:
            preparation.measure(record)
        except RecordError as error:
            where = f"; --dataset_dir says where, now {basic.dataset_dir}" if error.kind.endswith(" missing") else ""
            raise RecordError(f"{error}{where}", error.kind, error.image) from None
    return records


def answers(
    model: Qwen35,
    folder: str | Path,
    preparation: Preparation,
    records: Sequence[Record],
    batch: int,
    max_new_tokens: int | None = None,
    thinking: bool | None = None,
    sampling: Sampling = GREEDY,
    skip: Callable[[RecordError], object] | None = None,
) -> Iterator[Answer]:
    """The model's answer to each record, `batch` records at once.

    max_new_tokens None: what the longest right answer of a batch needs (a longer one is wrong), more after an open thought.
    thinking: whether the prompts open a thought; None: those of the records whose answer is trained with one.
    skip: is told of each record whose images cannot be read, which is then not answered; None: it raises RecordError.
    Raises SettingError.
    """
    tokenizer, spec, basic = preparation.tokenizer, vision_spec(folder), preparation.basic
    stop = stop_ids(folder, tokenizer)
    for start in range(0, len(records), batch):
        asked, prompts, room = [], [], 0
        for record in records[start : start + batch]:
            try:
                thinks = has_thought(record, basic.template, basic.enable_thinking) if thinking is None else thinking
                prompts.append(prompt_batch(record, preparation, spec, thinks))
            except RecordError as error:
                if skip is None:
                    raise
                skip(error)
                continue
            turn = record.turns[-1]
            right, thought = (
                tokenizer.encode_text(text, answer=True) for text in (answer_text(turn), turn.reasoning or "")
            )
            more = len(thought) + ROOM_TO_THINK if thinks else 0
            room = max(room, more + len(right) + 1)
            # decoded again: the tokenizer may write a character in another of its Unicode forms
            asked.append((record, without_thought(tokenizer.decode(right)), "<think>\n" * thinks))
        if not asked:
            continue
        given = generate(model, prompts, max_new_tokens or room, stop, sampling)
        for (record, wanted, opening), ids in zip(asked, given, strict=True):
            yield Answer(record, wanted, without_thought(opening + tokenizer.decode(ids)))


def without_thought(text: str) -> str:
    """What follows the thought. One that is opened and never closed stays: it is no right answer."""
    return text.rpartition("</think>")[2].strip()


def asked_how(thinking: bool | None, basic: BasicParameters) -> str:
    """For standard error: what the prompts are made by."""
    if basic.template == "qwen3_vl_nothink":
        thoughts = "no thoughts"
    elif thinking is not None:
        thoughts = "an open thought" if thinking else "an empty thought"
    elif basic.enable_thinking is False:
        thoughts = "an empty thought (enable_thinking: false)"
    else:
        thoughts = "an open thought where the record's answer has one, else an empty one"
    return f"template {basic.template}, {thoughts}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m qwen35.inference.evaluate", description=__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--data", required=True, help="records that end with the right answer; one file, or several with commas")
    add("--dataset_dir", help="where the records' images and videos lie; default: the folder of the (first) file")
    add("--batch", type=positive, default=64, help="records at once; default: 64")
    add(
        "--max_new_tokens",
        type=positive,
        help=f"default: what the longest right answer needs, and {ROOM_TO_THINK} more after an open thought",
    )
    add_thinking(parser, "as the record's answer is trained, which is open where it has a thought")
    add(
        "--sample",
        action="store_true",
        help=f"draw as the model's {FILE} says; default: the likeliest token, after its penalties",
    )
    add_sampling(parser, "with --sample")
    add("--show", action="store_true", help="print the records that were answered wrong")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    dataset_dir = args.dataset_dir or str(Path(args.data.split(",")[0]).parent)
    right = total = 0
    try:
        source = find_model(args.model, args.hf)
        preparation = prepare(args, source, args.data, dataset_dir)
        sampling = sampling_of(args, read_generation_config(source.config), args.sample)
        if args.sample and sampling.is_greedy:
            raise SettingError(f"--sample: {source.config}/{FILE} does not draw; give a --temperature")
        records = read_all(preparation)
        model = load_model(source)
        print(f"asked with {asked_how(args.thinking, preparation.basic)}; {sampling}", file=sys.stderr)
        how = (args.batch, args.max_new_tokens, args.thinking, sampling)
        given = answers(model, source.config, preparation, records, *how)
        for answer in tqdm(given, desc="answers", unit=" records", disable=not sys.stderr.isatty(), leave=False):
            total += 1
            right += answer.is_right
            if args.show and not answer.is_right:
                tqdm.write(f"{answer.record.source}: {answer.given!r}, right is {answer.wanted!r}")
    except USER_ERRORS as error:
        return complain(error)
    print(f"held-out accuracy {right / total:.3f} ({right}/{total})")
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
