"""The records that `on_bad_record: skip` left out: how many, why, and the first of them by name."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qwen35.data.record import RecordError


@dataclass
class Skipped:
    """Plain values only: the cache keeps it as JSON."""

    kinds: dict[str, int] = field(default_factory=dict)  # what is wrong -> number of records
    first: str = ""  # the first one's whole message
    images: dict[str, str] = field(default_factory=dict)  # files for which records were left out -> their state then

    @classmethod
    def merge(cls, parts: Iterable["Skipped"]) -> "Skipped":
        whole = cls()
        for part in parts:
            for kind, count in part.kinds.items():
                whole.kinds[kind] = whole.kinds.get(kind, 0) + count
            whole.first = whole.first or part.first
            whole.images |= part.images
        return whole

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
        """Whether an image is not what it was when its record was left out."""
        return any(_state(image) != state for image, state in self.images.items())


def _state(image: str) -> str:
    """Changes when the file is put there or replaced."""
    try:
        found = Path(image).stat()
    except OSError:
        return "missing"
    return f"{found.st_size} bytes, {found.st_mtime_ns}"
