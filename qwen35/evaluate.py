"""How often a model answers held-out records right: `python -m qwen35.evaluate --model DIR --data FILE`.

The last answer of each record is left to the model, which takes the likeliest token each time; right is what spells the same.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from qwen35.checkpoint.errors import CheckpointError
from qwen35.config import SettingError, load_settings
from qwen35.data import Record, RecordError
from qwen35.data.collate import prompt_batch, vision_spec
from qwen35.data.formats import ImageFolder, dataset_files, read_records
from qwen35.data.images import ImageError, ImageProcessor
from qwen35.data.samples import Preparation
from qwen35.data.template import Piece
from qwen35.data.tokens import ChatTokenizer
from qwen35.device import device_type
from qwen35.generate import greedy, stop_ids
from qwen35.model import ConfigError, Qwen35
from qwen35.settings import BasicParameters, DatasetParam

ROOM_TO_THINK = 1024  # tokens, with --thinking


@dataclass(frozen=True)
class Answer:
    record: Record
    wanted: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given == self.wanted


def load_model(folder: str | Path) -> Qwen35:
    """On this process's device, in the checkpoint's own dtypes: as whoever loads the folder will run it."""
    return Qwen35.from_pretrained(folder).to(torch.device(device_type())).eval()


def answers(
    model: Qwen35,
    folder: str | Path,
    preparation: Preparation,
    batch: int,
    max_new_tokens: int | None = None,
    thinking: bool = False,
) -> Iterator[Answer]:
    """The model's answer to each record of preparation.basic.dataset, `batch` records at once.

    max_new_tokens None: as many as the longest right answer of a batch needs, for a longer one is wrong anyway.
    Raises SettingError, RecordError.
    """
    basic, tokenizer, spec = preparation.basic, preparation.tokenizer, vision_spec(folder)
    files, images = dataset_files(basic.dataset), ImageFolder(basic.dataset_dir)
    records = list(chain.from_iterable(read_records(file, preparation.attr, images) for file in files))
    stop = stop_ids(folder, tokenizer)
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        wanted = [_without_thought(record.turns[-1].content) for record in some]
        room = max(len(tokenizer.encode([Piece(text)])[0]) for text in wanted) + 1 + ROOM_TO_THINK * thinking
        prompts = [prompt_batch(record, preparation, spec, thinking) for record in some]
        given = greedy(model, prompts, max_new_tokens or room, stop)
        for record, right, ids in zip(some, wanted, given, strict=True):
            yield Answer(record, right, _without_thought(tokenizer.decode(ids)))


def _without_thought(text: str) -> str:
    return text.rpartition("</think>")[2].strip()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qwen35.evaluate", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder")
    add("--data", required=True, help="records that end with the right answer; one file, or several with commas")
    add("--dataset_dir", help="where the records' images lie; default: the folder of the (first) file")
    add("--batch", type=int, default=64, help="records at once; default: 64")
    add("--max_new_tokens", type=int, help="default: what the longest right answer needs")
    add("--recipe", help="the run's config.yaml: asks as it trained, by its template, field names and image sizes")
    add("--template", choices=["qwen3_5", "qwen3_vl_nothink"], help="default: the recipe's, else qwen3_5")
    add("--thinking", action="store_true", help="let the model think first; default: it begins after an empty thought")
    add("--image_max_pixels", type=int, help="default: the recipe's, else 262144")
    add("--image_min_pixels", type=int, help="default: the recipe's, else 1024")
    add("--show", action="store_true", help="print the records that were answered wrong")
    args = parser.parse_args(arguments)
    if args.batch < 1 or (args.max_new_tokens is not None and args.max_new_tokens < 1):
        parser.error("--batch and --max_new_tokens are at least 1")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    dataset_dir = args.dataset_dir or str(Path(args.data.split(",")[0]).parent)
    right = total = 0
    try:
        trained = (
            load_settings(args.recipe).data.dataset_param if args.recipe else DatasetParam(BasicParameters(args.data))
        )
        limits = trained.preprocess_parameters
        smallest, largest = (
            args.image_min_pixels or limits.image_min_pixels,
            args.image_max_pixels or limits.image_max_pixels,
        )
        template = args.template or trained.basic_parameters.template
        preparation = Preparation(
            ChatTokenizer(args.model),
            ImageProcessor.from_folder(args.model, smallest, largest),
            BasicParameters(dataset=args.data, dataset_dir=dataset_dir, template=template),
            trained.attr,
        )
        model = load_model(args.model)
        given = answers(model, args.model, preparation, args.batch, args.max_new_tokens, args.thinking)
        for answer in tqdm(given, desc="answers", unit=" records", disable=not sys.stderr.isatty(), leave=False):
            total += 1
            right += answer.is_right
            if args.show and not answer.is_right:
                tqdm.write(f"{answer.record.source}: {answer.given!r}, right is {answer.wanted!r}")
    except (SettingError, RecordError, CheckpointError, ConfigError, ImageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"held-out accuracy {right / total if total else 0:.3f} ({right}/{total})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
