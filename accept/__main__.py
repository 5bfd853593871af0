"""Does this machine compute what the tests prove without an NPU, and how fast is it?

Each check runs in a process of its own with a time limit, so that one which fails hides no other.
Exit status 1 if something is off. Run by scripts/accept.sh.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path

from accept.report import Report, Row
from qwen35.console import outlive_readers
from qwen35.errors import USER_ERRORS, Parser, complain
from qwen35.processes import die_with
from rehearse.rates import rates_text

# check -> its time limit in seconds, first compilations included
CHECKS = {"machine": 300, "operators": 900, "layers": 600, "ranks": 600, "runs": 1200, "speed": 600, "slice": 900}
MODULES = {"operators": "numerics", "layers": "numerics", "ranks": "runs", "slice": "speed"}  # if not of its name


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="accept", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/accept"), help="folder of reports and rates.yaml; default: runs/accept")
    add("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"some of {', '.join(CHECKS)}; no rates.yaml")
    add("--small", action="store_true", help="small sizes, to try the command itself; no rates.yaml")
    add("--check", nargs=2, metavar=("CHECK", "FOLDER"), help="internal: run one check in this process")
    args = parser.parse_args(argv)
    try:
        if args.check:
            from accept.task import Task  # imports torch, whose failure must not end the command itself

            name, folder = args.check
            check = getattr(import_module(f"accept.{MODULES.get(name, name)}"), f"check_{name}")
            check(Task(Path(folder), args.small))
            return 0
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that `finally` is reached
        report = Report(socket.gethostname(), datetime.now().astimezone().strftime("%Y-%m-%d-%H%M"))
        for name in CHECKS:
            if name in (args.only or CHECKS) or name == "machine":
                run_check(report, name, args.small)
        return finish(report, args.out, is_whole=not (args.only or args.small))
    except USER_ERRORS as error:
        return complain(error)


def run_check(report: Report, name: str, small: bool) -> None:
    """Run a check in a process of its own, and report its rows even if it fails."""
    print(f"{name:10}", end="", flush=True)
    start = time.perf_counter()
    # data loaders make sockets below it, whose paths are limited to 107 bytes
    temporary = tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="accept-", dir=temporary, ignore_cleanup_errors=True) as folder:
        failure = run_process(name, Path(folder), small)
        lines, device = Path(folder, "rows.jsonl"), Path(folder, "device.json")
        rows = [Row(**json.loads(line)) for line in lines.read_text().splitlines()] if lines.exists() else []
        vars(report).update(json.loads(device.read_text()) if device.exists() else {})
    rows += [Row("runs to its end", "off", failure)] if failure else []
    report.add(name, rows, time.perf_counter() - start, os.environ)
    counts = ", ".join(f"{count} {status}" for status, count in report.count(name).items())
    print(f"{report.seconds[name]:6.0f} s  {counts}", flush=True)
    for row in report.rows[name]:
        if row.status in ("off", "slower"):
            print(f"  {row.status:7} {row.what}: {row.found}{row.wanted and f' ({row.wanted})'}", flush=True)


def run_process(name: str, folder: Path, small: bool) -> str:
    """Returns why the check failed, or an empty string. No process that it started is left."""
    (folder / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "accept", *["--small"] * small, "--check", name, str(folder)],
        env=os.environ | {"TMPDIR": str(folder / "tmp")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # there is one thread here
    )
    try:
        _, err = process.communicate(timeout=CHECKS[name])
    except subprocess.TimeoutExpired:
        return f"time limit of {CHECKS[name]} s exceeded"
    finally:  # the ranks end with their launcher
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = [line for line in err.splitlines() if line.strip()] or [f"exit status {process.returncode}"]
    return lines[-1] if process.returncode else ""


def finish(report: Report, out: Path, is_whole: bool) -> int:
    path = report.write(out)
    print(f"\n{report.verdict}\n{path}")
    if is_whole and report.is_apart and report.rates:
        (out / "rates.yaml").write_text(rates_text(report.kind, report.device, report.rates))
        print(f"{out}/rates.yaml: make rehearse uses it from now on")
    return 1 if report.count()["off"] else 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
