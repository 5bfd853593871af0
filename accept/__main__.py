"""Does this machine compute what the tests prove without one, and how fast? Each check runs in a process of its own with a time
limit, and hides no other. Of the report's words: slower (than make rehearse assumes), told (there is nothing to compare with).
Exit status 1 where something is off. Run by scripts/accept.sh.
"""

import json
import os
import re
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

# module -> seconds that it may take, first compilations among them
CHECKS = {"machine": 300, "operators": 900, "layers": 600, "ranks": 600, "runs": 1200, "speed": 600, "slice": 900}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="accept", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/accept"), help="folder of reports and rates.yaml; default runs/accept")
    add("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"some of {', '.join(CHECKS)}; no rates.yaml")
    add("--small", action="store_true", help="small sizes, to try the command itself; no rates.yaml")
    add("--check", nargs=2, metavar=("CHECK", "FOLDER"), help="what its own processes are asked for")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if args.check:
            from accept.task import Task  # it brings torch, for which this process has no need

            import_module(f"accept.{args.check[0]}").check(Task(Path(args.check[1]), args.small))
            return 0
        report = Report(socket.gethostname(), datetime.now().astimezone().strftime("%Y-%m-%d-%H%M"))
        for name in CHECKS:
            if name in (args.only or CHECKS) or name == "machine":
                examine(report, name, args.small)
        return finish(report, args.out, is_whole=not (args.only or args.small))
    except USER_ERRORS as error:
        return complain(error)


def examine(report: Report, name: str, small: bool) -> None:
    """One check in a process of its own, and what it has found up to its end, of whatever kind that is."""
    print(f"{name:10}", end="", flush=True)
    start = time.perf_counter()
    # below it a run's loaders have sockets, whose paths may have 107 bytes
    temporary = tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="accept-", dir=temporary, ignore_cleanup_errors=True) as folder:
        reason = run(name, Path(folder), small)
        file, about = Path(folder, "rows.jsonl"), Path(folder, "device.json")
        rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
        vars(report).update(json.loads(about.read_text()) if about.exists() else {})
    rows += [Row("comes to its end", "off", reason)] if reason else []
    report.add(name, rows, time.perf_counter() - start, os.environ)
    counts = ", ".join(f"{count} {status}" for status, count in report.count(name).items())
    print(f"{report.seconds[name]:6.0f} s  {counts}", flush=True)
    for row in report.rows[name]:
        if row.status in ("off", "slower"):
            print(f"  {row.status:7} {row.what}: {row.found}{row.wanted and f' ({row.wanted})'}", flush=True)


def run(name: str, folder: Path, small: bool) -> str:
    """-> why the check did not come to its end; nothing if it did. No process of it is left."""
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
        _, words = process.communicate(timeout=CHECKS[name])
    except subprocess.TimeoutExpired:
        return f"not over after {CHECKS[name]} s"
    finally:  # ranks end with the launcher that started them
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = [line for line in words.splitlines() if line.strip()][-1:]
    return "" if process.returncode == 0 else "".join(last) or f"ended by {process.returncode}"


def finish(report: Report, out: Path, is_whole: bool) -> int:
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{re.sub(r'[^A-Za-z0-9_-]', '-', report.host)}-{report.date}"
    write(stem.with_suffix(".json"), json.dumps(report.json(), indent=1) + "\n")
    write(stem.with_suffix(".md"), report.markdown())
    print(f"\n{report.verdict}\n{stem}.md")
    if is_whole and report.is_apart and report.rates:
        write(out / "rates.yaml", rates_text(report.kind, report.device, report.rates))
        print(f"{out}/rates.yaml: make rehearse takes it from now on")
    return 1 if report.count()["off"] else 0


def write(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
