"""What every program of a rank does: read its settings, and tell the launcher why it failed."""

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
from qwen35.log import set_up_logging

FAILURE_FILE = "QWEN35_FAILURE_FILE"  # the file in which a failing rank writes the reason
RESTART = "QWEN35_RESTART"  # how often the ranks have been restarted


def leave(code: int) -> NoReturn:
    """Flush the output and end this process at once.

    A normal exit would wait for workers and peers that may be gone, and abort ("terminate called
    without an active exception") while a thread of a process group still frees a tensor.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the disk is full
        code = code or 1
    os._exit(code)


def record_failure(error: BaseException, is_user_error: bool) -> bool:
    """In a failing process: write the reason for the launcher. False if that is not possible."""
    if FAILURE_FILE not in os.environ:
        return False
    reason = {
        "message": one_line(error) if is_user_error else str(error),
        "traceback": "" if is_user_error else "".join(traceback.format_exception(error)),
        "time": time.time(),
        "rank": os.environ.get("RANK"),
        "is_user_error": is_user_error,
    }
    path = Path(os.environ[FAILURE_FILE])
    try:
        path.with_suffix(".new").write_text(json.dumps(reason))
        path.with_suffix(".new").replace(path)
    except OSError:
        return False
    return True


def run_rank(
    work: Callable[[Settings], None],
    name: str,
    description: str | None,
    argv: Sequence[str] | None,
    *user_errors: type[Exception],
) -> int:
    """Call `work` with the settings of the command line. user_errors: further user error types.

    If several ranks fail, the launcher prints the reason of the first; no rank prints its own.
    """
    parser = Parser(prog=name, description=description)
    parser.add_argument("config", help="a recipe, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    args = parser.parse_args(argv)
    try:
        set_up_logging(int(os.environ.get("RANK", "0")))
        work(load_settings(args.config, args.overrides))
    except BaseException as error:
        is_user_error = isinstance(error, (*USER_ERRORS, *user_errors))
        if record_failure(error, is_user_error):
            leave(1)
        if is_user_error:
            return complain(error)
        raise
    return 0
