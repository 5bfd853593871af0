"""`python -m qwen35.data convert …` and `python -m qwen35.data show CONFIG [a.b=c …]`."""

import os
import sys
from pathlib import Path

from qwen35.config.load import load_settings
from qwen35.data.llava import Options, convert
from qwen35.data.preview import show
from qwen35.errors import USER_ERRORS, Parser, complain, whole_number


def parser() -> Parser:
    top = Parser(prog="python -m qwen35.data", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    c = commands.add_parser("convert", help="LLaVA-Instruct and its images -> training records")
    c.add_argument("--llava", type=Path, required=True, help="llava_instruct_150k.json")
    c.add_argument("--images", type=Path, required=True, help="folder of its images, e.g. data/COCO2017/train2017")
    c.add_argument("--out", type=Path, required=True, help="file to write")
    c.add_argument("--on_missing", choices=["error", "skip"], default="error", help="records whose image is not there")
    c.add_argument(
        "--on_bad_record", choices=["error", "skip"], default="error", help="records that cannot be used for any reason"
    )
    c.add_argument("--check", choices=["headers", "none"], default="headers", help="what is read of each image")
    c.add_argument("--tokenizer", type=Path, help="model folder: the report counts tokens, else characters")
    c.add_argument("--workers", type=whole_number(1), help="processes (default: the cores of this machine)")
    s = commands.add_parser("show", help="samples as they are trained, the trained tokens marked")
    s.add_argument("config", help="a recipe, e.g. configs/tiny.yaml")
    s.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings over those of the recipe")
    s.add_argument("--samples", type=whole_number(1), default=3, help="how many (default: 3)")
    return top


def main(argv: list[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    if args.command == "show" and not any(word.startswith("-") for word in rest):
        args.overrides += rest  # argparse wants them all before --samples
    elif rest:
        parser().error(f"unknown: {' '.join(rest)}")
    try:
        if args.command == "convert":
            print(convert(Options(**{name: value for name, value in vars(args).items() if name != "command"})))
        else:
            settings = load_settings(args.config, args.overrides)
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            for text in show(settings, args.samples, colour):
                print(text, flush=True)
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        return complain(error, prefix="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
