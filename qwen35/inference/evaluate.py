"""Exact match of a model's answers: `python -m qwen35.inference.evaluate --model DIR --data FILE`.

The model writes the last answer of each record anew, greedily or by sampling (--sample). It is
right if it ends and the text is the same, thoughts and surrounding white space aside. Tool calls
are compared as the chat template writes them, so their order counts, and that of their arguments.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from qwen35.config.schema import BasicParameters, dataset_entries
from qwen35.console import outlive_readers
from qwen35.data import Record, RecordError
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.formats import read_records
from qwen35.data.mixture import dataset_files, dataset_name
from qwen35.data.preparation import Preparation
from qwen35.data.template import answer_text, has_thought
from qwen35.errors import USER_ERRORS, Parser, SettingError, complain
from qwen35.inference.generate import GREEDY, generate
from qwen35.inference.generation_config import FILE, add_sampling, read_generation_config, sampling_of, stop_ids
from qwen35.inference.load_model import add_options, add_thinking, find_model, load_model, positive, prepare, tell_sizes
from qwen35.inference.sampling import Sampling
from qwen35.model import Qwen35
from qwen35.wording import number_of

ROOM_TO_THINK = 1024  # tokens added to the limit of an answer that begins with a thought
ROOM_TO_END = 4  # tokens for the white space after an answer, and for its end


@dataclass(frozen=True)
class Answer:
    record: Record
    wanted: str
    given: str
    is_cut: bool = False  # at the limit: nobody knows how it would have gone on

    @property
    def is_right(self) -> bool:
        return self.given == self.wanted and not self.is_cut


def read_all(preparation: Preparation) -> list[Record]:
    """The records of preparation.basic.dataset, measured. Raises SettingError, RecordError."""
    basic = preparation.basic
    files, images = dataset_files(basic.dataset), preparation.folder()
    warnings = DataWarnings()
    read = (read_records(file, preparation.attr, images, warnings=warnings) for file in files)
    records = list(chain.from_iterable(read))
    if not records:
        raise RecordError(f"{dataset_name(basic.dataset)}: no records")
    for record in records:
        odd: list[str] = []
        try:
            preparation.measure(record, odd)
        except RecordError as error:
            hint = f"; --dataset_dir says where, now {basic.dataset_dir}" if error.kind.endswith(" missing") else ""
            raise RecordError(f"{error}{hint}", error.kind, error.image) from None
        for kind in odd:
            warnings.count(kind, 1, record.source)
    for line in warnings.lines():
        print(f"data: {line}", file=sys.stderr)
    right = [record for record in records if record.has_right_answer]
    if left := [record for record in records if not record.has_right_answer]:
        what = f"{len(left)} of {number_of(len(records), 'record')}: the loss mask leaves the last answer out"
        if not right:
            raise RecordError(f"nothing is asked of {what}")
        print(f"data: not asked: {what}; first: {left[0].source}", file=sys.stderr)
    return right


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

    max_new_tokens: None for the length of the batch's longest right answer, and room for thoughts.
    thinking: whether prompts open a thought; None: as the record's answer would be trained.
    skip: called for a record whose images cannot be read; None: raise RecordError.
    Raises SettingError.
    """
    tokenizer, spec, style = preparation.tokenizer, vision_spec(folder), preparation.style
    stop = stop_ids(folder, tokenizer)
    for start in range(0, len(records), batch):
        asked, prompts, longest = [], [], 0
        for record in records[start : start + batch]:
            try:
                thinks = has_thought(record, style) if thinking is None else thinking
                prompts.append(prompt_batch(record, preparation, spec, thinks))
            except RecordError as error:
                if skip is None:
                    raise
                skip(error)
                continue
            turn = record.turns[-1]
            right = tokenizer.encode_text(answer_text(turn, style), answer=True)
            thought = tokenizer.encode_text(turn.reasoning or "", answer=True)
            longest = max(longest, len(right) + ROOM_TO_END + (len(thought) + ROOM_TO_THINK if thinks else 0))
            # decoded again, since the tokenizer may normalize characters to another Unicode form
            asked.append((record, without_thought(tokenizer.decode(right)), "<think>\n" * thinks))
        if not asked:
            continue
        limit = max_new_tokens or longest
        given = generate(model, prompts, limit, stop, sampling)
        for (record, wanted, opening), ids in zip(asked, given, strict=True):
            yield Answer(record, wanted, without_thought(opening + tokenizer.decode(ids)), len(ids) == limit)


def without_thought(text: str) -> str:
    """The text after the thought. A thought that never ends stays, and makes the answer wrong."""
    return text.rpartition("</think>")[2].strip()


def asked_how(thinking: bool | None, basic: BasicParameters) -> str:
    """The template and thoughts of the prompts, as a message."""
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
    add("--dataset_dir", help="folder of the records' images and videos; default: the folder of the files")
    add("--batch", type=positive, default=64, help="records answered at once; default: 64")
    limit = f"default: the length of the longest right answer, and {ROOM_TO_THINK} more after an open thought"
    add("--max_new_tokens", type=positive, help=limit)
    add_thinking(parser, "open where the record's answer has a thought, else empty")
    sample = f"sample as the model's {FILE} says; default: greedy, with its penalties"
    add("--sample", action="store_true", help=sample)
    add_sampling(parser, "with --sample")
    add("--show", action="store_true", help="print the wrong answers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    folders = list(dict.fromkeys(str(file.parent) for file in (Path(name.strip()) for name in args.data.split(","))))
    right = total = cut = 0
    try:
        source = find_model(args.model, args.hf)
        preparation = prepare(args, source, args.data, args.dataset_dir or folders[0])
        sampling = sampling_of(args, read_generation_config(source.config), args.sample)
        if args.sample and sampling.is_greedy:
            raise SettingError(f"--sample: {source.config}/{FILE} does not sample; give a --temperature")
        records = read_all(preparation)
        if len(folders) > 1 and not args.dataset_dir and any(record.visuals for record in records):
            raise SettingError(
                f"the files of --data lie in {' and '.join(folders)}: give --dataset_dir, the folder of the images of all"
            )
        trained = dataset_entries(source.train_set.basic_parameters.dataset) if source.train_set else []
        known = {Path(entry.file).resolve() for entry in trained}
        for entry in dataset_entries(args.data):
            if Path(entry.file).resolve() in known:
                print(f"{entry.file} is what the run trained on, so nothing in it was held out", file=sys.stderr)
        model = load_model(source)
        tell_sizes(args, source, preparation, records)
        print(f"asked with {asked_how(args.thinking, preparation.basic)}; {sampling}", file=sys.stderr)
        options = args.batch, args.max_new_tokens, args.thinking, sampling
        stream = answers(model, source.config, preparation, records, *options)
        for answer in tqdm(stream, desc="answers", unit=" records", disable=not sys.stderr.isatty(), leave=False):
            total += 1
            right += answer.is_right
            cut += answer.is_cut
            if args.show and not answer.is_right:
                tqdm.write(f"{answer.record.source}: {answer.given!r}, right is {answer.wanted!r}")
    except USER_ERRORS as error:
        return complain(error)
    if cut:
        print(f"{cut} of the answers did not end within --max_new_tokens, and count as wrong", file=sys.stderr)
    print(f"held-out accuracy {right / total:.3f} ({right}/{total})")
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
