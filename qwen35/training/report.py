"""The page of a run, <save>/report.html: `python -m qwen35.training.report RUN [RUN …]`.

It is one file without scripts, its plots inline. Training writes it at each save; this command
writes it anew, or with several runs a page that compares them.
"""

import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from qwen35.checkpoint.folders import write_atomic
from qwen35.config.load import difference, load_settings
from qwen35.console import outlive_readers
from qwen35.errors import USER_ERRORS, Parser, complain
from qwen35.training.history import MARKS, read_facts
from qwen35.training.metrics import RunError, draw_loss, read_metrics

if TYPE_CHECKING:  # a run need not wait for it at its start
    from matplotlib.axes import Axes

POINTS = 500  # of a curve: longer ones are drawn as means over as many stretches of steps
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

Run: TypeAlias = tuple[str, list[dict[str, Any]]]  # name, lines of metrics.jsonl
Plot: TypeAlias = "tuple[str, Callable[[Axes], object]]"  # title, and what draws it


def write_report(folder: Path) -> None:
    """<folder>/loss.png and <folder>/report.html, by what lies in it. Raises RunError."""
    draw_loss(folder)
    write_atomic(folder / "report.html", page_of(folder))


def page_of(folder: Path) -> str:
    lines, facts = _metrics(folder), read_facts(folder)
    last, validated = lines[-1], [line for line in lines if "val_loss" in line]
    now = [("step", f"{last['step']:,} of {facts.get('steps', last['step']):,}"), ("loss", f"{last['loss']:.4f}")]
    for line in validated[-1:]:
        now += [(name, f"{line[name]:.4f}") for name in ("val_loss", "val_exact_match") if name in line]
    now.append(("tokens/s", f"{np.mean([line['tokens_per_second'] for line in lines[-20:]]):,.0f}"))
    starts = [
        (s["time"], f"step {s['step'] + 1}", f"restart {s['restart']}: {s['reason']}" if s["restart"] else "")
        for s in facts.get("starts", [])
    ]
    recipe = folder / "config.yaml"
    parts = [
        _table(now),
        _plots(_curves([(folder.name, lines)]), _loads(lines), _lengths(facts)),
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
    runs = [(str(folder), _metrics(folder)) for folder in folders]
    ends = [(name, f"{lines[-1]['step']:,}", f"{lines[-1]['loss']:.4f}") for name, lines in runs]
    parts = [
        _table([("run", "step", "loss"), *ends]),
        _plots(_curves(runs)),
        f"<h2>Settings that differ from {escape(folders[0].name)}'s</h2>",
        *(f"<h3>{escape(f.name)}</h3>{_pre(text)}" for f, text in zip(folders[1:], changes, strict=True)),
    ]
    return _page(" and ".join(map(str, folders)), parts)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    if lines := read_metrics(folder / "metrics.jsonl"):
        return lines
    raise RunError(f"{folder}: has no metrics.jsonl with a step; name the folder that training.save names")


# -- plots -----------------------------------------------------------------------------------------


PLOTS: tuple[tuple[str, Sequence[str], dict[str, Any]], ...] = (  # title, metrics, what is set of the axis
    ("loss", ("loss", "mtp_loss", "val_loss", "val_mtp_loss"), {}),
    ("exact match", ("val_exact_match",), {"ylim": (-0.02, 1.02)}),
    ("gradient norm", ("grad_norm",), {"yscale": "log"}),
    ("gradient norm by group", ("grad_norms",), {"yscale": "log"}),
    ("learning rate", ("lr",), {}),
    ("tokens a second", ("tokens_per_second",), {}),
    ("model FLOPs utilization", ("mfu",), {}),
    ("seconds a step", ("step_time", "data_time"), {}),
    ("bytes of memory at the peak", ("memory",), {}),
    ("load-balancing loss", ("aux_loss",), {}),
)


def _curves(runs: Sequence[Run]) -> Iterator[Plot]:
    """The plots over steps that show anything; those by group only of one run alone."""
    for title, names, options in PLOTS:
        if names == ("grad_norms",):
            names = [
                f"grad_norms.{group}" for _, lines in runs[: len(runs) == 1] for group in lines[-1].get(*names, {})
            ]
        curves = [(run, name, *_series(lines, name)) for run, lines in runs for name in names]
        if curves := [curve for curve in curves if any(curve[-1])]:
            yield title, partial(_draw_curves, curves, options, len(runs) > 1)


def _draw_curves(curves: Sequence[Any], options: Mapping[str, Any], several: bool, axis: "Axes") -> None:
    for run, name, steps, values in curves:
        what = name.partition(".")[2] or name
        style = ".-" if name.startswith("val_") else "--" if len(axis.lines) > 9 else "-"  # ten colours
        axis.plot(steps, values, style, linewidth=1, label=f"{run} {what}" if several else what)
    axis.set(xlabel="step", **options)
    if len(curves) > 1:
        outside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(curves) > 4 else {}
        axis.legend(fontsize="small", **outside)


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, at most POINTS of them: means over stretches of a long run."""
    key, _, part = name.partition(".")
    found = [(line["step"], line[key].get(part) if part else line[key]) for line in lines if line.get(key) is not None]
    points = np.array([point for point in found if point[1] is not None], dtype=float).reshape(-1, 2)
    if len(points) > POINTS and not name.startswith("val_"):
        points = np.array([stretch.mean(0) for stretch in np.array_split(points, POINTS)])
    return points[:, 0], points[:, 1]


def _loads(lines: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    """The heat map of the experts' load, layers by steps."""
    rows = [(line["step"], line["expert_load"]) for line in lines if "expert_load" in line]
    if not rows:
        return
    stretches = np.array_split(np.array([load for _, load in rows]), min(POINTS, len(rows)))
    load = np.array([stretch.mean(0) for stretch in stretches]).T  # [L, stretches]

    def draw(axis: "Axes") -> None:
        image = axis.imshow(
            load, aspect="auto", origin="lower", cmap="viridis", vmin=1, interpolation="nearest",
            extent=(rows[0][0] - 0.5, rows[-1][0] + 0.5, -0.5, len(load) - 0.5),
        )  # fmt: skip
        axis.set(xlabel="step", ylabel="layer")
        axis.locator_params("y", integer=True)
        axis.figure.colorbar(image, ax=axis)

    yield "tokens of the busiest expert, times the mean", draw


def _lengths(facts: Mapping[str, Any]) -> Iterator[Plot]:
    if "lengths" in facts:
        counts, edges = facts["lengths"]["counts"], facts["lengths"]["edges"]

        def draw(axis: "Axes") -> None:
            axis.stairs(counts, edges, fill=True)
            axis.set(xlabel="tokens", ylabel="samples")

        yield "lengths of the samples", draw


def _plots(*groups: Iterator[Plot]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figures = []
    for group in groups:
        for title, draw in group:
            figure = Figure(figsize=(5.6, 3.2), layout="constrained")
            draw(axis := figure.subplots())
            axis.set_title(title, fontsize="medium")
            file = io.StringIO()
            with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # the same page for the same run
                figure.savefig(file, format="svg", metadata={"Date": None})
            svg = file.getvalue()
            figures.append(re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg[svg.index("<svg") :], count=1))
    return f'<div class="plots">{"".join(figures)}</div>'


# -- HTML ------------------------------------------------------------------------------------------


def _page(title: str, parts: Sequence[str]) -> str:
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


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
        write_atomic(out, comparison(args.runs) if several else page_of(args.runs[0]))
    except USER_ERRORS as error:
        return complain(error)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
