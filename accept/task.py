"""What a check is given, and how it compares two results."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from accept.report import Row
from qwen35.device import device_count, device_type, has_own_memory
from qwen35.errors import UserError


class AcceptError(UserError):
    """A check that could not be made."""


@dataclass(frozen=True)
class Task:
    """What a check is given. Its process may end at any moment, so each row is written as it is found."""

    folder: Path  # empty, its own, removed afterwards
    small: bool

    @property
    def ranks(self) -> int:
        """Of a run on this machine, as scripts/finetune.sh counts them."""
        kind = torch.device(device_type())
        return int(os.environ.get("NPUS_PER_NODE") or (device_count() if has_own_memory(kind) else 2))

    def add(self, *row: object) -> None:
        """The fields of a Row."""
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Row(*row))) + "\n")  # type: ignore[arg-type]

    def compare(self, what: str, errors: dict[str, float], most: float, why: str) -> None:
        """errors: name -> relative error. One that is no number is off too."""
        status = "held" if all(error <= most for error in errors.values()) else "off"
        found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        self.add(what, status, found, f"<= {most:.0e}, {why}" if most else why)

    def measure(self, device: torch.device, what: str, found: str, ratio: float, assumed: str, *rate: object) -> None:
        """ratio: of the speed to what rehearse assumes at its slow end, which holds for NPUs alone."""
        status = "told" if not has_own_memory(device) else "held" if ratio >= 1 else "slower"
        self.add(what, status, found, f"assumed of an NPU: {assumed}", *rate)


def distance(ours: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """|ours - exact| / |exact| in the Euclidean norm, the largest of several; NaN where one is."""
    pairs = [(a.detach().to(b.device, b.dtype), b.detach()) for a, b in zip(ours, exact, strict=True)]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]
    return max(errors, key=lambda error: (error != error, error))
