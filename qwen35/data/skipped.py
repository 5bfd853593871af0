"""The records that `on_bad_record: skip` left out: how many, why, and the first one's message."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qwen35.data.record import RecordError


@dataclass
class Skipped:
    """Plain values only: the cache stores it as JSON."""

    kinds: dict[str, int] = field(default_factory=dict)  # kind of error -> number of records
    first: str = ""  # message of the first
    images: dict[str, str] = field(default_factory=dict)  # image file at fault -> its state at that time

    @classmethod
    def merge(cls, parts: Iterable["Skipped"]) -> "Skipped":
        merged = cls()
        for part in parts:
            for kind, count in part.kinds.items():
                merged.kinds[kind] = merged.kinds.get(kind, 0) + count
            merged.first = merged.first or part.first
            merged.images |= part.images
        return merged

    def add(self, error: RecordError) -> None:
        self.kinds[error.kind] = self.kinds.get(error.kind, 0) + 1
        self.first = self.first or str(error)
        if error.image is not None:
            self.images[error.image] = _state(error.image)

    def __len__(self) -> int:
        return sum(self.kinds.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items(), key=lambda item: -item[1]))
        return f"{kinds}; first: {self.first}"

    def is_outdated(self) -> bool:
        """Whether an image at fault has changed since its record was left out."""
        return any(_state(image) != state for image, state in self.images.items())


def _state(image: str) -> str:
    """Changes when the file is created or replaced."""
    try:
        stat = Path(image).stat()
    except OSError:
        return "missing"
    return f"{stat.st_size} bytes, {stat.st_mtime_ns}"
