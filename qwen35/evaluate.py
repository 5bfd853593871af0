"""How often a model answers held-out records right: `python -m qwen35.evaluate --model DIR --data FILE`.

The last answer of each record is left to the model, which takes the likeliest token each time; right is what spells the same.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from qwen35.chat import add_options, find_model, load_model, positive, prepare, stop_ids
from qwen35.data import Record, RecordError
from qwen35.data.collate import prompt_batch, vision_spec
from qwen35.data.formats import read_records
from qwen35.data.mixture import dataset_files, dataset_name
from qwen35.data.samples import Preparation
from qwen35.data.template import Piece
from qwen35.errors import USER_ERRORS, Parser, complain
from qwen35.generate import greedy
from qwen35.model import Qwen35

ROOM_TO_THINK = 1024  # tokens, with --thinking


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
    records = list(chain.from_iterable(read_records(file, preparation.attr, images) for file in files))
    if not records:
        raise RecordError(f"{dataset_name(basic.dataset)}: no records")
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
    thinking: bool = False,
    skip: Callable[[RecordError], object] | None = None,
) -> Iterator[Answer]:
    """The model's answer to each record, `batch` records at once.

    max_new_tokens None: as many as the longest right answer of a batch needs, for a longer one is wrong anyway.
    skip: is told of each record whose images cannot be read, which is then not answered; None: it raises RecordError.
    Raises SettingError.
    """
    tokenizer, spec = preparation.tokenizer, vision_spec(folder)
    stop = stop_ids(folder, tokenizer)
    for start in range(0, len(records), batch):
        some, prompts = [], []
        for record in records[start : start + batch]:
            try:
                prompts.append(prompt_batch(record, preparation, spec, thinking))
                some.append(record)
            except RecordError as error:
                if skip is None:
                    raise
                skip(error)
        if not some:
            continue
        wanted = [_without_thought(record.turns[-1].content) for record in some]
        room = (
            max(len(tokenizer.encode([Piece(text, answer=True)])[0]) for text in wanted) + 1 + ROOM_TO_THINK * thinking
        )
        given = greedy(model, prompts, max_new_tokens or room, stop)
        for record, right, ids in zip(some, wanted, given, strict=True):
            yield Answer(record, right, _without_thought(tokenizer.decode(ids)))


def _without_thought(text: str) -> str:
    return text.rpartition("</think>")[2].strip()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m qwen35.evaluate", description=__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--data", required=True, help="records that end with the right answer; one file, or several with commas")
    add("--dataset_dir", help="where the records' images and videos lie; default: the folder of the (first) file")
    add("--batch", type=positive, default=64, help="records at once; default: 64")
    add("--max_new_tokens", type=positive, help="default: what the longest right answer needs")
    add("--thinking", action="store_true", help="let the model think first; default: it begins after an empty thought")
    add("--show", action="store_true", help="print the records that were answered wrong")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    dataset_dir = args.dataset_dir or str(Path(args.data.split(",")[0]).parent)
    right = total = 0
    try:
        source = find_model(args.model, args.hf)
        preparation = prepare(args, source, args.data, dataset_dir)
        records = read_all(preparation)
        model = load_model(source)
        given = answers(model, source.config, preparation, records, args.batch, args.max_new_tokens, args.thinking)
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
    sys.exit(main())
