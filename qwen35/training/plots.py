"""What a run's metrics look like: <save>/loss.png, and the plots of its page (report.py)."""

import io
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from qwen35.errors import naming
from qwen35.training.metrics import iterate_metrics

if TYPE_CHECKING:  # a run need not wait for it at its start
    from matplotlib.axes import Axes

POINTS = 500  # of a curve: longer ones are drawn as means over as many stretches of steps
Plot: TypeAlias = "tuple[str, Callable[[Axes], object]]"  # title, and what draws it
PLOTS: tuple[tuple[str, Sequence[str], dict[str, Any]], ...] = (  # title, metrics, what is set of the axis
    ("loss", ("loss", "mtp_loss", "val_loss", "val_mtp_loss"), {}),
    ("exact match", ("val_exact_match",), {"ylim": (-0.02, 1.02)}),
    ("margin of the rewards", ("rewards/margins", "val_rewards/margins"), {}),
    ("pairs whose chosen answer gains more", ("rewards/accuracies", "val_rewards/accuracies"), {"ylim": (-0.02, 1.02)}),
    ("rewards", ("rewards/chosen", "rewards/rejected"), {}),
    ("log-probabilities of the answers", ("logps/chosen", "logps/rejected"), {}),
    ("gradient norm", ("grad_norm",), {"yscale": "log"}),
    ("gradient norm by group", ("grad_norms",), {"yscale": "log"}),
    ("learning rate", ("lr",), {}),
    ("tokens a second", ("tokens_per_second",), {}),
    ("model FLOPs utilization", ("mfu",), {}),
    ("seconds a step", ("step_time", "data_time"), {}),
    ("bytes of memory at the peak", ("memory",), {}),
    ("load-balancing loss", ("aux_loss",), {}),
)


@dataclass(frozen=True)
class Curves:
    """All numbers of a metrics.jsonl, in arrays: as Python's objects they would take a gigabyte."""

    by_name: dict[str, np.ndarray]  # [n, 2] step and value; those by group as grad_norms.experts
    load_steps: np.ndarray  # [n]
    loads: np.ndarray  # [n, L] of each layer, the tokens of its busiest expert over the mean

    @classmethod
    def read(cls, folder: Path) -> "Curves":
        """Of <folder>/metrics.jsonl, what is no number left out. Raises RunError."""
        columns: dict[str, array[float]] = {}
        steps, loads = array("d"), array("f")
        layers = 0
        for _, line in iterate_metrics(folder / "metrics.jsonl"):
            if line is None or not _is_finite(line["step"]):
                continue
            for name, value in _numbers(line):
                columns.setdefault(name, array("d")).extend((line["step"], value))
            load = line.get("expert_load")
            if isinstance(load, list) and load and all(map(_is_finite, load)) and len(load) == (layers or len(load)):
                layers = len(load)
                steps.append(line["step"])
                loads.extend(load)
        by_name = {name: np.array(column).reshape(-1, 2) for name, column in columns.items()}
        return cls(by_name, np.array(steps), np.array(loads).reshape(len(steps), layers))

    def last(self, name: str, count: int = 1) -> float | None:
        """The mean of a metric's last values; None if it has none."""
        return float(self.by_name[name][-count:, 1].mean()) if name in self.by_name else None


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        parts = value.items() if isinstance(value, Mapping) else ()
        for key, number in ((name, value), *((f"{name}.{part}", number) for part, number in parts)):
            if _is_finite(number):
                yield key, number


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300 and math.isfinite(value)


def _thinned(points: np.ndarray) -> np.ndarray:
    """[n, …] -> at most POINTS rows, each the mean over a stretch."""
    if len(points) <= POINTS:
        return points
    return np.array([stretch.mean(0) for stretch in np.array_split(points, POINTS)])


# -- the plots of a page ---------------------------------------------------------------------------


def curves(runs: Sequence[tuple[str, Curves]]) -> Iterator[Plot]:
    """The plots over steps that show anything, of runs and their names; of one, those by group."""
    for title, names, options in PLOTS:
        if names == ("grad_norms",):
            names = [
                name for _, run in runs[: len(runs) == 1] for name in run.by_name if name.startswith("grad_norms.")
            ]
        found = [(label, name, run.by_name[name]) for label, run in runs for name in names if name in run.by_name]
        if found := [curve for curve in found if curve[-1][:, 1].any()]:
            yield title, partial(_draw_curves, found, options, len(runs) > 1)


def _draw_curves(
    found: Sequence[tuple[str, str, np.ndarray]], options: Mapping[str, Any], several: bool, axis: "Axes"
) -> None:
    for run, name, points in found:
        what = name.partition(".")[2] or name
        style = ".-" if name.startswith("val_") else "--" if len(axis.lines) > 9 else "-"  # ten colours
        axis.plot(*_thinned(points).T, style, linewidth=1, label=f"{run} {what}" if several else what)
    axis.set(xlabel="step", **options)
    if len(found) > 1:
        outside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(found) > 4 else {}
        axis.legend(fontsize="small", **outside)


def expert_loads(run: Curves) -> Iterator[Plot]:
    """The heat map of the experts' load, layers by steps."""
    load, steps = _thinned(run.loads).T, run.load_steps

    def draw(axis: "Axes") -> None:
        image = axis.imshow(
            load, aspect="auto", origin="lower", cmap="viridis", vmin=1, interpolation="nearest",
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(load) - 0.5),
        )  # fmt: skip
        axis.set(xlabel="step", ylabel="layer")
        axis.locator_params("y", integer=True)
        axis.figure.colorbar(image, ax=axis)

    if len(steps):
        yield "tokens of the busiest expert, times the mean", draw


def lengths(facts: Mapping[str, Any]) -> Iterator[Plot]:
    """The histogram of the samples' lengths, as history.py keeps it."""
    if "lengths" in facts:
        counts, edges, unit = (facts["lengths"].get(name, "sample") for name in ("counts", "edges", "unit"))

        def draw(axis: "Axes") -> None:
            axis.stairs(counts, edges, fill=True)
            axis.set(xlabel="tokens", ylabel=f"{unit}s")

        yield f"lengths of the {unit}s", draw


def as_svg(plots: Iterable[Plot]) -> Iterator[str]:
    """Each plot as an <svg> that is as wide as its place."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    for title, draw in plots:
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        draw(axis := figure.subplots())
        axis.set_title(title, fontsize="medium")
        file = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # the same page for the same run
            figure.savefig(file, format="svg", metadata={"Date": None})
        svg = file.getvalue()
        yield re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg[svg.index("<svg") :], count=1)


# -- loss.png --------------------------------------------------------------------------------------


def smoothed(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The mean of those around each value, over 1/25 of them all; at the ends over fewer."""
    window = np.ones(len(values) // 25 | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_loss(run: Curves, folder: Path) -> None:
    """-> <folder>/loss.png"""
    from matplotlib.figure import Figure

    with_answers = "val_exact_match" in run.by_name
    figure = Figure(figsize=(8, 6 if with_answers else 4.5), layout="constrained")
    axes = figure.subplots(1 + with_answers, sharex=True, squeeze=False)
    upper, lower, rate = axes[0, 0], axes[-1, 0], axes[0, 0].twinx()
    ends: list[float] = []  # of what the axis shows
    for name, axis, style, color in (
        ("loss", upper, "-", "tab:blue"),
        ("mtp_loss", upper, "-", "tab:orange"),
        ("val_loss", upper, ".-", "tab:red"),
        ("val_mtp_loss", upper, ".-", "tab:brown"),
        ("val_exact_match", lower, ".-", "tab:green"),
        ("lr", rate, "--", "tab:gray"),
    ):
        if name not in run.by_name:
            continue
        steps, values = run.by_name[name].T
        if axis is upper:  # the first steps, and spikes of single ones, would press the rest flat
            tail = values[len(values) // 5 if len(values) >= 20 else 0 :]
            ends += [float(tail.min()), float(np.quantile(tail, 0.99 if style == "-" else 1))]
        if style == "-":
            axis.plot(steps, values, style, color=color, linewidth=0.8, alpha=0.3)
            name, values = f"{name} (smoothed)", smoothed(values)
        axis.plot(steps, values, style, color=color, linewidth=1.2, label=name)
    if ends:
        low, high = min(ends), max(ends)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        upper.set_ylim(low - margin, high + margin)
        named = [line for line in (*upper.lines, *rate.lines) if not line.get_label().startswith("_")]
        figure.legend(handles=named, loc="outside lower center", ncols=len(named), frameon=False)
    upper.set(ylabel="loss", title=str(folder))
    lower.set(xlabel="step")
    if with_answers:
        lower.set(ylabel="exact match", ylim=(0, 1.02))
    rate.set_ylabel("learning rate", color="tab:gray")
    partial = folder / "loss.tmp.png"
    try:
        with naming(folder / "loss.png"):
            figure.savefig(partial, dpi=120)
            partial.replace(folder / "loss.png")
    finally:
        partial.unlink(missing_ok=True)
