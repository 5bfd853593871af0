"""The program of a rank: its settings, its end, and the reason that it leaves for whoever started it."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from qwen35.config.load import load_settings
from qwen35.config.schema import Settings
from qwen35.errors import USER_ERRORS, Parser, complain, one_line

FAILURE_FILE = "QWEN35_FAILURE_FILE"  # where a process that fails leaves its reason
RESTART = "QWEN35_RESTART"  # how often the processes have been started before


def leave(code: int) -> NoReturn:
    """End this process here and now, with nothing left to write.

    Python's own way out would wait for workers and peers that may be gone, and abort ("terminate called without an
    active exception") where a thread of a process group still lets go of a tensor.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads them any more, or their disk is full
        code = code or 1
    os._exit(code)


def record_failure(error: BaseException, expected: bool) -> bool:
    """In a process that fails: leave the reason for the launcher. False if there is none, or no room on the disk."""
    if FAILURE_FILE not in os.environ:
        return False
    reason = {
        "message": one_line(error) if expected else str(error),
        "traceback": "" if expected else "".join(traceback.format_exception(error)),
        "time": time.time(),
        "rank": os.environ.get("RANK"),
        "expected": expected,
    }
    path = Path(os.environ[FAILURE_FILE])
    try:
        path.with_suffix(".new").write_text(json.dumps(reason))
        path.with_suffix(".new").replace(path)
    except OSError:
        return False
    return True


def run_rank(
    work: Callable[[Settings], None], name: str, about: str | None, argv: Sequence[str] | None, *own: type[Exception]
) -> int:
    """What a rank's program does: `work`, with the settings of its command line. own: errors of its own that a user can mend.

    Of several ranks that fail the launcher prints the first one's reason, and not every rank its own.
    """
    parser = Parser(prog=name, description=about)
    parser.add_argument("config", help="a recipe, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    args = parser.parse_args(argv)
    try:
        work(load_settings(args.config, args.overrides))
    except BaseException as error:
        is_expected = isinstance(error, (*USER_ERRORS, *own))
        if record_failure(error, is_expected):
            leave(1)
        if is_expected:
            return complain(error)
        raise
    return 0
