"""The lengths of samples, as text and as a picture."""

from pathlib import Path

import numpy as np

BUCKETS, WIDTH = 12, 40  # of the text


def histogram(lengths: np.ndarray, unit: str) -> str:
    """Quantiles of the lengths, and a histogram of bars."""
    p50, p90, p99 = (int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.9, 0.99))
    spread = f"half have up to {p50:,}, 90% up to {p90:,}, 99% up to {p99:,}, the longest {lengths.max():,}"
    lines = [f"{unit}: {spread}; {lengths.sum():,} in all"]
    counts, edges = np.histogram(lengths, _edges(int(lengths.max()), BUCKETS))
    columns = len(f"{edges[-1]:,}")
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        bar = "#" * -(-count * WIDTH // int(counts.max()))
        lines.append(f"  {low:>{columns},} to {high - 1:>{columns},} {bar:{WIDTH}} {count:,}")
    return "\n".join(lines)


def draw(lengths: np.ndarray, unit: str, title: str, file: Path) -> None:
    """The histogram as a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    axis.hist(lengths, bins=_edges(int(lengths.max()), 80).tolist(), color="tab:blue")
    axis.set(xlabel=unit, ylabel="number", title=title)
    figure.tight_layout()
    figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def _edges(longest: int, buckets: int) -> np.ndarray:
    """Bucket edges from 0 to beyond `longest`, in round steps."""
    rough = (longest + 1) / buckets
    scale = 10 ** max(0, int(np.floor(np.log10(rough)))) if rough > 1 else 1
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough)
    return np.arange(0, (longest // step + 2) * step, step)
