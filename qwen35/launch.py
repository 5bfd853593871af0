"""Start one training process a device: `python -m qwen35.launch [torchrun's options] CONFIG [a.b=c …]`.

The settings are checked before anything starts. When a process fails, the others are stopped, and what is printed is the
failure that came first: one line where it is the user's to mend, the traceback where it is ours.
"""

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from qwen35.config import SettingError, load_settings

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torch's agent sets it for each process, and reads the file when that fails


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="qwen35.launch", description=__doc__)
    parser.add_argument("config", help="a recipe, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    argv = list(sys.argv[1:] if argv is None else argv)
    first = next((i for i, word in enumerate(argv) if word.endswith((".yaml", ".yml")) or word in {"-h", "--help"}), 0)
    args = parser.parse_args(argv[first:])
    logging.disable(logging.ERROR)  # what torch's agent has to say of a failure is said below
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        load_settings(args.config, args.overrides)
        torchrun.run(torchrun.parse_args([*argv[:first], "-m", "qwen35.train", args.config, *args.overrides]))
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ChildFailedError as failed:
        told = [f.error_file_data["message"] for f in failed.failures.values() if "message" in f.error_file_data]
        told.sort(key=lambda message: message["extraInfo"]["time"])
        # a rank whose peer is gone may fail in the same moment; the user's own mistake explains it
        words = next((m["message"] for m in told if m["extraInfo"]["expected"]), None)
        if words is None and told:
            words = f"{told[0]['extraInfo']['py_callstack']}rank {told[0]['extraInfo']['rank']}: {told[0]['message']}"
        rank, first_failure = failed.get_first_failure()
        print(f"error: {words or f'rank {rank}: {first_failure.message}'}", file=sys.stderr)
        return 1
    return 0


def record_failure(error: BaseException, expected: bool) -> bool:
    """In a process that fails: leave the reason for the launcher. False if there is no launcher to read it."""
    if ERROR_FILE not in os.environ:
        return False
    extra = {
        "py_callstack": "".join(traceback.format_exception(error)),
        "timestamp": str(int(time.time())),
        "time": time.time(),
        "rank": os.environ.get("RANK"),
        "expected": expected,
    }
    Path(os.environ[ERROR_FILE]).write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}))
    return True


if __name__ == "__main__":
    sys.exit(main())
