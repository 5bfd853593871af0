"""The lengths of samples, as text and as a picture."""

from pathlib import Path

import numpy as np

BUCKETS, WIDTH = 12, 40  # of the text
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths that are among those given: at least this share of them is not longer."""
    return {name: int(np.quantile(lengths, q, method="higher")) for name, q in QUANTILES.items()}


def histogram(lengths: np.ndarray, unit: str, cutoff_len: int | None = None) -> str:
    """Quantiles of the lengths, and a histogram of bars with a line for cutoff_len."""
    spread = ", ".join(f"{name} {length:,}" for name, length in quantiles(lengths).items())
    lines = [f"{unit}: {spread}, longest {lengths.max():,}; {lengths.sum():,} in all"]
    counts, edges = np.histogram(lengths, _edges(lengths, BUCKETS))
    columns = len(f"{edges[-1]:,}")
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        bar = "#" * -(-count * WIDTH // int(counts.max()))
        lines.append(f"  {low:>{columns},} to {high - 1:>{columns},} {bar:{WIDTH}} {count:,}")
    if cutoff_len is not None:
        longer = int((lengths > cutoff_len).sum())
        cutoff = f"  {'-' * columns} cutoff_len {cutoff_len:,}: {longer:,} ({longer / len(lengths):.1%}) are longer"
        lines.insert(1 + int(np.searchsorted(edges[:-1], cutoff_len, "right")), cutoff)
    return "\n".join(lines)


def draw(lengths: np.ndarray, unit: str, title: str, file: Path, cutoff_len: int | None = None) -> None:
    """The histogram as a PNG file, with lines for its quantiles and cutoff_len."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="tight")
    axis = figure.subplots()
    edges = _edges(lengths, 80).tolist()
    axis.hist(lengths, bins=edges, color="tab:blue")
    for (name, length), style in zip(quantiles(lengths).items(), (":", "-.", "--"), strict=True):
        axis.axvline(length, color="tab:gray", linestyle=style, linewidth=1, label=f"{name} {length:,}")
    if cutoff_len is not None:
        axis.axvline(cutoff_len, color="tab:red", linewidth=1.5, label=f"cutoff_len {cutoff_len:,}")
    if cutoff_len is not None and cutoff_len > 2 * edges[-1]:  # so far away it is in the legend alone
        axis.set_xlim(edges[0], edges[-1])
    axis.set(xlabel=unit, ylabel="number", title=title)
    axis.legend()
    figure.savefig(file, dpi=120, format="png")


def _edges(lengths: np.ndarray, buckets: int) -> np.ndarray:
    """Bucket edges from the shortest length or below to beyond the longest, in round steps."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    rough = (longest - shortest + 1) / buckets
    scale = 10 ** max(0, int(np.floor(np.log10(rough)))) if rough > 1 else 1
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough)
    return np.arange(shortest // step * step, (longest // step + 2) * step, step)
