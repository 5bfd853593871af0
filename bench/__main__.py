"""Speed and memory on a CPU, as ratios: `python -m bench [--only NAME …] [--all] [--json]`.

Each row runs in a process of its own, twice: with the default memory allocator, and with the
settings that env.sh exports for CPU runs. Rows that need more than 24 GB or take the peer many
minutes run only if they are named, or with --all.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "34359738368", "MALLOC_TRIM_THRESHOLD_": "68719476736"}


def main() -> int:
    from bench.rows import ROWS, matmul_rate, measure

    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"run only these rows: {', '.join(ROWS)}")
    parser.add_argument("--all", action="store_true", help="run also the rows that take long or much memory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--row", choices=[*ROWS, "rate"], help=argparse.SUPPRESS
    )  # internal: run one row in this process
    args = parser.parse_args()
    if args.row:
        print(json.dumps({"matmul_gflops": matmul_rate() / 1e9} if args.row == "rate" else measure(args.row)))
        return 0
    if unknown := [name for name in args.only or [] if name not in ROWS]:
        parser.error(f"--only {unknown[0]}: no such row; choose from {', '.join(ROWS)}")
    names = [name for name in ROWS if name in args.only] if args.only else [n for n in ROWS if args.all or ROWS[n][2]]
    report: dict[str, Any] = {"machine": machine(), "rows": []}
    for allocator in ("default", "tuned"):
        report["machine"][f"matmul_gflops_{allocator}"] = run("rate", allocator)["matmul_gflops"]
    if not args.json:
        print(", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in report["machine"].items()))
    for name in names:
        for allocator in ("default", "tuned"):
            result = run(name, allocator) | {"allocator": allocator, "to_reach": ROWS[name][1]}
            report["rows"].append(result)
            if not args.json:
                print(line(result), flush=True)
    if args.json:
        print(json.dumps(report, indent=1))
    elif left := [name for name in ROWS if name not in names]:
        print(f"not run: {', '.join(left)} (--only NAME, or --all for every row)")
    return 1 if any("error" in row for row in report["rows"]) else 0


def machine() -> dict[str, Any]:
    import torch

    return {"device": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}


def run(row: str, allocator: str) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    if allocator == "tuned":
        env |= {name: os.environ.get(name, value) for name, value in ALLOCATOR.items()}
    command = [sys.executable, "-m", "bench", "--row", row]
    child = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    if child.returncode < 0:
        return {"row": row, "error": f"killed by signal {-child.returncode}: out of memory?"}
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        return {"row": row, "error": lines[-1] if lines else f"exit status {child.returncode}: out of memory?"}
    return json.loads(child.stdout.splitlines()[-1])


def line(result: dict[str, Any]) -> str:
    """One row of the table, with the ratios first."""
    head = f"{result['row']:16} {result['allocator']:8}"
    figures = {k: v for k, v in result.items() if k not in ("row", "allocator", "to_reach", "threads")}
    ordered = sorted(figures, key=lambda k: "ratio" not in k)
    text = ", ".join(f"{k} {figures[k]:.3g}" if isinstance(figures[k], float) else f"{k} {figures[k]}" for k in ordered)
    return f"{head} {text}  [{result['to_reach']}]"


if __name__ == "__main__":
    sys.exit(main())
