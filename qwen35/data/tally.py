"""What `make data` tells of the records it wrote: how many, how long, and which were left out."""

from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen35.data.data_warnings import DataWarnings
from qwen35.data.files import replacing
from qwen35.data.record import RecordError
from qwen35.data.skipped import Skipped
from qwen35.data.special_tokens import SpecialTokens

BUCKETS, WIDTH = 12, 40
NAMED = 1000  # records left out that the file of the report names


@dataclass
class Tally:
    unit: str  # of the lengths: "tokens" or "characters"
    records: int = 0
    turns: int = 0
    images: int = 0
    lengths: "array[int]" = field(default_factory=lambda: array("q"))  # of each record
    skipped: Skipped = field(default_factory=Skipped)
    warnings: DataWarnings = field(default_factory=DataWarnings)
    special_tokens: SpecialTokens = field(default_factory=SpecialTokens)  # where there is a tokenizer
    named: list[str] = field(default_factory=list)  # the first of them, in full

    def add(self, turns: int, images: int, length: int) -> None:
        self.records += 1
        self.turns += turns
        self.images += images
        self.lengths.append(length)

    def skip(self, error: RecordError) -> None:
        self.skipped.add(error)
        if len(self.named) < NAMED:
            self.named.append(str(error))

    def histogram(self) -> str:
        """The lengths: some numbers, and a bar for each stretch."""
        lengths = np.asarray(self.lengths)
        half, most, nearly = (int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.9, 0.99))
        spread = f"half have up to {half:,}, 90% up to {most:,}, 99% up to {nearly:,}, the longest {lengths.max():,}"
        lines = [f"{self.unit} a record: {spread}; {lengths.sum():,} in all"]
        counts, edges = np.histogram(lengths, _edges(int(lengths.max())))
        columns = len(f"{edges[-1]:,}")
        for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            bar = "#" * -(-count * WIDTH // int(counts.max()))
            lines.append(f"  {low:>{columns},} to {high - 1:>{columns},} {bar:{WIDTH}} {count:,}")
        return "\n".join(lines)

    def write(self, report: str, out: Path) -> tuple[Path, Path]:
        """<out>.report.txt with every record that was left out, and <out>.lengths.png. Raises OSError."""
        text, picture = out.with_suffix(".report.txt"), out.with_suffix(".lengths.png")
        with replacing(text) as temporary:
            more = len(self.skipped) - len(self.named)
            lines = [report, *self.named, *([f"… and {more:,} more"] if more else [])]
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
        axis.set(xlabel=f"{self.unit} a record", ylabel="records", title=title)
        figure.tight_layout()
        figure.savefig(file, dpi=120, format="png")
        plt.close(figure)


def _edges(longest: int, buckets: int = BUCKETS) -> np.ndarray:
    """From 0 in round steps to more than `longest`."""
    rough = (longest + 1) / buckets
    scale = 10 ** max(0, int(np.floor(np.log10(rough)))) if rough > 1 else 1
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough)
    return np.arange(0, (longest // step + 2) * step, step)
