"""The page of a run, <save>/report.html: `python -m qwen35.training.report RUN [RUN …]`.

It is one file without scripts, its plots inline. Training writes it at each save; this command
writes it anew, or with several runs a page that compares them.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

from qwen35.checkpoint.folders import write_atomic
from qwen35.config.load import difference, load_settings
from qwen35.console import outlive_readers
from qwen35.errors import USER_ERRORS, Parser, complain
from qwen35.training.history import MARKS, read_facts
from qwen35.training.metrics import RunError
from qwen35.training.plots import Curves, Plot, as_svg, curves, draw_loss, expert_loads, lengths

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1a1a1a; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.plots svg, img { max-width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .7rem; font-size: .85rem; }
mark { background: #b9e6c0; } .wrong { background: #f6c9c4; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
"""


def write_report(folder: Path) -> None:
    """<folder>/loss.png and <folder>/report.html, by what lies in it. Raises RunError."""
    run = read_run(folder)
    draw_loss(run, folder)
    write_atomic(folder / "report.html", page_of(folder, run))


def read_run(folder: Path) -> Curves:
    """Raises RunError if it has not done one step."""
    run = Curves.read(folder)
    if "loss" not in run.by_name:
        raise RunError(f"{folder}: has no metrics.jsonl with a step; name the folder that training.save names")
    return run


def page_of(folder: Path, run: Curves) -> str:
    facts = read_facts(folder)
    done = int(run.by_name["loss"][-1, 0])
    pairs = [f"{of}rewards/{name}" for of in ("", "val_") for name in ("margins", "accuracies")]
    values = {name: run.last(name) for name in ("loss", "val_loss", "val_exact_match", *pairs)}
    now = [("step", f"{done:,} of {facts.get('steps', done):,}")]
    now += [(name, f"{value:.4f}") for name, value in values.items() if value is not None]
    now.append(("tokens/s", f"{run.last('tokens_per_second', 20) or 0:,.0f}"))
    starts = [
        (s["time"], f"step {s['step'] + 1}", f"restart {s['restart']}: {s['reason']}" if s["restart"] else "")
        for s in facts.get("starts", [])
    ]
    recipe = folder / "config.yaml"
    parts = [
        _table(now),
        _plots(chain(curves([(folder.name, run)]), expert_loads(run), lengths(facts))),
        _section("Data", _pre(facts.get("data", "")), _table(facts.get("files", []))),
        _section("Samples as the model gets them, trained tokens marked", *map(_sample, facts.get("samples", []))),
        _section("Answers of validations", *_answers(facts.get("answers", []))),
        _section("Starts", _table(starts)),
        _section("What it runs on", _pre(facts.get("runs_on", ""))),
        _section("Settings", _pre(recipe.read_text(encoding="utf-8") if recipe.exists() else "")),
    ]
    return _page(str(folder), parts)


def comparison(folders: Sequence[Path]) -> str:
    """A page on several runs: their curves in the same plots, and the settings that differ."""
    first, *others = (load_settings(folder / "config.yaml") for folder in folders)
    changes = ["\n".join(difference(first, other)) or "none" for other in others]
    runs = [(str(folder), read_run(folder)) for folder in folders]
    ends = [(name, f"{run.by_name['loss'][-1, 0]:,.0f}", f"{run.last('loss'):.4f}") for name, run in runs]
    parts = [
        _table([("run", "step", "loss"), *ends]),
        _plots(curves(runs)),
        f"<h2>Settings that differ from {escape(folders[0].name)}'s</h2>",
        *(f"<h3>{escape(f.name)}</h3>{_pre(text)}" for f, text in zip(folders[1:], changes, strict=True)),
    ]
    return _page(" and ".join(map(str, folders)), parts)


# -- HTML ------------------------------------------------------------------------------------------


def _page(title: str, parts: Sequence[str]) -> str:
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _plots(plots: Iterable[Plot]) -> str:
    return f'<div class="plots">{"".join(as_svg(plots))}</div>'


def _section(title: str, *contents: str) -> str:
    """Nothing if the run has none of the contents."""
    return f"<h2>{escape(title)}</h2>{''.join(contents)}" if any(contents) else ""


def _pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>" if text else ""


def _table(rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    cells = ("".join(f"<td>{escape(str(value))}</td>" for value in row) for row in rows)
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


def _sample(sample: Mapping[str, Any]) -> str:
    text = escape(sample["text"]).replace(MARKS[0], "<mark>").replace(MARKS[1], "</mark>")
    images = "".join(f'<img src="{escape(uri)}" alt=""> ' for uri in sample["images"])
    return f"<h3>{escape(sample['title'])}</h3>{images}<pre>{text}</pre>"


def _answers(validations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for validation in reversed(validations):
        rows = (
            f"<tr><td>{escape(a['source'])}<td class={'right' if a['is_right'] else 'wrong'}>{escape(a['given'])}"
            f"<td>{escape(a['wanted'])}"
            for a in validation["answers"]
        )
        head = "<tr><th>record<th>answer<th>right answer"
        yield f'<h3>step {validation["step"]}</h3><div class="wide"><table>{head}{"".join(rows)}</table></div>'


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m qwen35.training.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of training.save")
    parser.add_argument("--out", type=Path, help="the page; default: report.html of a run, comparison.html for several")
    args = parser.parse_args(argv)
    try:
        several = len(args.runs) > 1
        out = args.out or (Path("comparison.html") if several else args.runs[0] / "report.html")
        write_atomic(out, comparison(args.runs) if several else page_of(args.runs[0], read_run(args.runs[0])))
    except USER_ERRORS as error:
        return complain(error)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
