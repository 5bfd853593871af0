"""Prepare training records (convert), show samples as they are trained (show), or their lengths."""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qwen35.config.load import DATA, NO_RUN, from_flat, load_settings, no_option, parse_dataset
from qwen35.config.schema import TRAIN_SET
from qwen35.data.llava import Options, convert
from qwen35.data.mixture import dataset_files
from qwen35.data.preview import lengths_report, show
from qwen35.errors import USER_ERRORS, Parser, complain, whole_number


def parser() -> Parser:
    top = Parser(prog="python -m qwen35.data", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    c = commands.add_parser("convert", help="convert LLaVA-Instruct and its images into training records")
    c.add_argument("--llava", type=Path, required=True, help="llava_instruct_150k.json")
    c.add_argument("--images", type=Path, required=True, help="folder of its images, e.g. data/COCO2017/train2017")
    c.add_argument("--out", type=Path, required=True, help="file to write")
    policy: dict[str, Any] = {"choices": ["error", "skip"], "default": "error"}
    c.add_argument("--on_missing", **policy, help="what to do with records whose image is missing (default: error)")
    c.add_argument("--on_bad_record", **policy, help="what to do with any record that cannot be used (default: error)")
    what = "what to read of images (default: headers)"
    c.add_argument("--check", choices=["headers", "none"], default="headers", help=what)
    c.add_argument("--tokenizer", type=Path, help="model folder, to report lengths in tokens instead of characters")
    c.add_argument("--workers", type=whole_number(1), help="number of processes (default: one per core)")
    s = commands.add_parser("show", help="show samples as they are trained, with the trained tokens marked")
    s.add_argument("config", help="a recipe, e.g. configs/tiny.yaml")
    s.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the recipe's")
    s.add_argument("--samples", type=whole_number(1), default=3, help="how many to show (default: 3)")
    s.add_argument("--lengths", action="store_true", help="show how long all samples are instead")
    s.add_argument("--picture", type=Path, help="with --lengths: a PNG file to draw them to")
    n = commands.add_parser("lengths", help="the same for any records, with the default settings of a recipe")
    n.add_argument("--data", required=True, help=f"records as for training; {DATA}")
    n.add_argument("--tokenizer", required=True, help="model folder, whose tokens are counted")
    n.add_argument("--dataset_dir", help="folder of the records' images and videos (default: that of the first file)")
    n.add_argument("--stage", choices=["sft", "dpo"], default="sft", help="dpo: of preference pairs (default: sft)")
    n.add_argument("--cutoff_len", type=whole_number(1), default=2048, help="to compare with (default: 2048)")
    return top


def main(argv: list[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    option = next((word for word in rest if word.startswith("-")), None)
    if args.command == "show" and not option:
        args.overrides += rest  # argparse only accepts them before --samples
    elif rest:
        parser().error(no_option(option) if args.command == "show" and option else f"unknown: {' '.join(rest)}")
    try:
        if args.command == "convert":
            print(convert(Options(**{name: value for name, value in vars(args).items() if name != "command"})))
        elif args.command == "lengths":
            first, *_ = dataset_files(dataset := parse_dataset(args.data, args.stage))
            basic = {"dataset": dataset, "dataset_dir": args.dataset_dir or str(first.parent)}
            with TemporaryDirectory(prefix="qwen35-") as images:  # those that records hold themselves
                basic |= {"cutoff_len": args.cutoff_len, "cache_dir": images}
                flat = {f"{TRAIN_SET}.basic_parameters.{name}": value for name, value in basic.items()}
                flat |= NO_RUN | {"model.model_name_or_path": args.tokenizer, "training.stage": args.stage}
                print(lengths_report(from_flat(flat), first.with_suffix(".lengths.png")))
        elif args.lengths or args.picture:
            print(lengths_report(load_settings(args.config, args.overrides), args.picture))
        else:
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            for text in show(load_settings(args.config, args.overrides), args.samples, colour):
                print(text, flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        return complain(error, prefix="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
