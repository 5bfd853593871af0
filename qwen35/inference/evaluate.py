"""Exact match of a model's answers: `python -m qwen35.inference.evaluate --model DIR --data FILE`.

The model is asked as by `make predict`, and writes the last answer of each record anew. It is right
if it ends and the text is the same, thoughts and surrounding white space aside. Tool calls are
compared as the chat template writes them, so their order counts, and that of their arguments.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from qwen35.config.schema import dataset_entries
from qwen35.console import outlive_readers
from qwen35.errors import USER_ERRORS, Parser, complain
from qwen35.inference.predict import ROOM_TO_THINK, Answer, Questions, add_questions


def is_right(answer: Answer) -> bool:
    return answer.given == answer.wanted and not answer.is_cut


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m qwen35.inference.evaluate", description=__doc__)
    limit = f"the length of the longest right answer, and {ROOM_TO_THINK} more after an open thought"
    add_questions(parser, "records that end with the right answer", limit)
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    right = total = cut = 0
    try:
        questions = Questions.read(args, answered=True)
        run = questions.source.train_set
        known = {Path(entry.file).resolve() for entry in dataset_entries(run.basic_parameters.dataset if run else "")}
        for entry in dataset_entries(questions.asking.preparation.basic.dataset):
            if Path(entry.file).resolve() in known:
                print(f"{entry.file} is what the run trained on, so nothing in it was held out", file=sys.stderr)
        for found in questions.answers(questions.load_model(args), args.batch, args.max_new_tokens):
            total += len(found)
            right += sum(map(is_right, found))
            cut += sum(answer.is_cut for answer in found)
            for answer in found if args.show else ():
                if not is_right(answer):
                    tqdm.write(f"{answer.record.source}: {answer.given!r}, right is {answer.wanted!r}")
    except USER_ERRORS as error:
        return complain(error)
    if cut:
        print(f"{cut} of the answers did not end within --max_new_tokens, and count as wrong", file=sys.stderr)
    print(f"held-out accuracy {right / max(total, 1):.3f} ({right}/{total})")
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
