"""What each check is given, and how it compares two results."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from accept.report import Row
from qwen35.device import device_count, device_type, has_own_memory
from rehearse.rates import WORST

FORMATS = {"flops": (1e12, "TFLOPS"), "memory": (1e9, "GB/s"), "within": (1e9, "GB/s"), "host": (1e-6, "us")}
Outputs = tuple[Sequence[Tensor], Sequence[Tensor]]  # outputs, and the leaves whose gradients are wanted


@dataclass(frozen=True)
class Task:
    """A check's process may end at any moment, so each row is written as soon as it is known."""

    folder: Path  # empty, the check's own, removed afterwards
    small: bool

    @property
    def is_apart(self) -> bool:
        """Whether the device is an accelerator."""
        return has_own_memory(torch.device(device_type()))

    @property
    def ranks(self) -> int:
        """Of a run on this machine, as scripts/finetune.sh counts them."""
        return int(os.environ.get("NPUS_PER_NODE") or (device_count() if self.is_apart else 2))

    @property
    def size(self) -> str:
        """The published dense model whose layers are used."""
        return "0.8B" if self.small else "4B"

    def add(self, *row: object) -> None:
        """The fields of a Row."""
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Row(*row))) + "\n")  # type: ignore[arg-type]

    def compare(self, what: str, errors: dict[str, float], most: float, why: str) -> None:
        """errors: name -> relative error. NaN is off too."""
        status = "held" if all(error <= most for error in errors.values()) else "off"
        found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        self.add(what, status, found, f"<= {most:.0e}, {why}" if most else why)

    def add_speed(self, what: str, found: str, ratio: float, assumed: str, *rate: object) -> None:
        """ratio: the speed over what make rehearse assumes of an NPU in its worst case."""
        status = "info" if not self.is_apart else "held" if ratio >= 1 else "slower"
        self.add(what, status, found, f"assumed of an NPU: {assumed}", *rate)

    def add_rate(self, what: str, name: str, value: float, found: str = "", is_rate: bool = True) -> None:
        """name: of a rate in rehearse/rates.py. is_rate: it goes into rates.yaml."""
        (scale, unit), assumed = FORMATS[name], getattr(WORST, name)
        ratio, rate = assumed / value if name == "host" else value / assumed, (name, value) * is_rate
        self.add_speed(what, f"{found}{value / scale:.3g} {unit}", ratio, f"{assumed / scale:.0f} {unit}", *rate)


def distance(ours: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """|ours - exact| / |exact| in the Euclidean norm, the largest of several; NaN if one is."""
    pairs = [(a.detach().to(b.device, b.dtype), b.detach()) for a, b in zip(ours, exact, strict=True)]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]
    return max(errors, key=lambda error: (error != error, error))


def errors_of(ours: Outputs, exact: Outputs) -> dict[str, float]:
    """Of outputs and gradients, for fixed output gradients that every dtype can represent."""
    gradients = []
    for outputs, leaves in (ours, exact):
        directions = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16() for y in outputs]
        directions = [direction.to(y) for direction, y in zip(directions, outputs, strict=True)]
        gradients.append(torch.autograd.grad(outputs, leaves, directions))
    return {"forward": distance(ours[0], exact[0]), "gradients": distance(*gradients)}
