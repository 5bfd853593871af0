"""The report of `make data`: how many records it wrote, how long they are, which were left out."""

from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen35.data.data_warnings import DataWarnings
from qwen35.data.files import replacing
from qwen35.data.record import RecordError
from qwen35.data.skipped import Skipped
from qwen35.data.special_tokens import SpecialTokens

BUCKETS, WIDTH = 12, 40  # of the text histogram
MAX_ERRORS = 1000  # of records left out, in the report file


@dataclass
class Tally:
    unit: str  # of the lengths: "tokens" or "characters"
    records: int = 0
    turns: int = 0
    images: int = 0
    lengths: "array[int]" = field(default_factory=lambda: array("q"))  # of the records, in `unit`
    skipped: Skipped = field(default_factory=Skipped)
    warnings: DataWarnings = field(default_factory=DataWarnings)
    special_tokens: SpecialTokens = field(default_factory=SpecialTokens)  # counted only with a tokenizer
    errors: list[str] = field(default_factory=list)  # messages of the first records left out

    def add(self, turns: int, images: int, length: int) -> None:
        self.records += 1
        self.turns += turns
        self.images += images
        self.lengths.append(length)

    def skip(self, error: RecordError) -> None:
        self.skipped.add(error)
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(str(error))

    def histogram(self) -> str:
        """Quantiles of the lengths, and a histogram of bars."""
        lengths = np.asarray(self.lengths)
        p50, p90, p99 = (int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.9, 0.99))
        spread = f"half have up to {p50:,}, 90% up to {p90:,}, 99% up to {p99:,}, the longest {lengths.max():,}"
        lines = [f"{self.unit} per record: {spread}; {lengths.sum():,} in all"]
        counts, edges = np.histogram(lengths, _edges(int(lengths.max())))
        columns = len(f"{edges[-1]:,}")
        for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            bar = "#" * -(-count * WIDTH // int(counts.max()))
            lines.append(f"  {low:>{columns},} to {high - 1:>{columns},} {bar:{WIDTH}} {count:,}")
        return "\n".join(lines)

    def write(self, report: str, out: Path) -> tuple[Path, Path]:
        """<out>.report.txt, with the records left out, and <out>.lengths.png. Raises OSError."""
        text, picture = out.with_suffix(".report.txt"), out.with_suffix(".lengths.png")
        with replacing(text) as temporary:
            more = len(self.skipped) - len(self.errors)
            lines = [report, *self.errors, *([f"… and {more:,} more"] if more else [])]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with replacing(picture) as temporary:
            self._draw(temporary, out.name)
        return text, picture

    def _draw(self, file: Path, title: str) -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        lengths = np.asarray(self.lengths)
        figure, axis = plt.subplots(figsize=(8, 4.5))
        axis.hist(lengths, bins=_edges(int(lengths.max()), 80).tolist(), color="tab:blue")
        axis.set(xlabel=f"{self.unit} per record", ylabel="records", title=title)
        figure.tight_layout()
        figure.savefig(file, dpi=120, format="png")
        plt.close(figure)


def _edges(longest: int, buckets: int = BUCKETS) -> np.ndarray:
    """Bucket edges from 0 to beyond `longest`, in round steps."""
    rough = (longest + 1) / buckets
    scale = 10 ** max(0, int(np.floor(np.log10(rough)))) if rough > 1 else 1
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough)
    return np.arange(0, (longest // step + 2) * step, step)
