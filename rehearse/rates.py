"""The rates of an NPU and its links: assumed ones, best and worst, or measured by make accept.

The best rates are peaks; the worst ones were measured by others or are assumed. Sources:
- arithmetic: CANN's platform file of Ascend 910B2C has 24 cube cores of 16 x 16 x 16 products at
  1.8 GHz, that is 354 TFLOPS; a public measurement (the README of limulidae) reached 328 with one
  large bf16 matmul. Over a step 40% of the peak is assumed.
- memory: the same file has 32 bytes a cycle and core, 1.38 TB/s; the same measurement 0.64 TB/s
  for an elementwise operator.
- within a node: the same measurement has 149 GB/s for an all-gather of 8 NPUs and 72 for an
  all-reduce.
- between nodes: a port of 200 Gb/s for each NPU, 25 GB/s; 60% of it is assumed.
- copies: PCIe 4.0 x16 has 31.5 GB/s in each direction; 40% of it is assumed.
- host: 3 to 15 microseconds an operator, assumed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from qwen35.config.load import parse_yaml
from qwen35.errors import SettingError, read_text


@dataclass(frozen=True)
class Rates:
    flops: float  # FLOP/s
    memory: float  # bytes/s
    within: float  # bytes/s that an NPU sends within its node
    between: float  # bytes/s that an NPU sends to other nodes
    copies: float  # bytes/s between an NPU and its host's memory
    host: float  # seconds for an operator


BEST = Rates(354e12, 1.38e12, 149e9, 25e9, 31.5e9, 3e-6)
WORST = Rates(0.4 * 354e12, 0.64e12, 72e9, 0.6 * 25e9, 0.4 * 31.5e9, 15e-6)
UNITS = {"flops": "FLOP/s", "memory": "B/s", "within": "B/s", "between": "B/s", "copies": "B/s", "host": "s"}


@dataclass(frozen=True)
class RateRange:
    """The rates behind a step's best and worst time. A measured rate is the same in both."""

    best: Rates = BEST
    worst: Rates = WORST
    source: str = "all rates assumed, none measured"


def read_rates(path: Path, kind: str) -> RateRange:
    """The measured rates in a rates.yaml, and the assumed ones for the rest.

    kind: the device type that is rehearsed. Raises SettingError for an incomplete file, an unknown
    name or unit, and rates of another device type.
    """
    text = read_text(path, SettingError, "no such file; make accept writes a file of rates on a machine with NPUs")
    found = parse_yaml(text, str(path))
    known = ("kind", "device", *UNITS)
    if not isinstance(found, dict) or not {"kind", "device"} <= found.keys() or len(found) < 3:
        raise SettingError(f"{path}: not a file of rates, which has kind, device and some of {', '.join(UNITS)}")
    if unknown := next((name for name in found if name not in known), None):
        raise SettingError(f"{path}: {unknown}: no such rate; the names are {', '.join(known)}")
    if found["kind"] != kind:
        raise SettingError(
            f"{path}: kind: these are the rates of a {found['kind']} ({found['device']}), not of an {kind}"
        )
    rates = {name: _number(path, name, found[name]) for name in UNITS if name in found}
    rest = [name for name in UNITS if name not in rates]
    source = f"{', '.join(rates)} measured on {found['device']}" + (f"; {', '.join(rest)} assumed" if rest else "")
    return RateRange(replace(BEST, **rates), replace(WORST, **rates), source)


def _number(path: Path, name: str, value: object) -> float:
    """The number in "2.9e+14 FLOP/s"."""
    number, _, unit = str(value).partition(" ")
    if unit != UNITS[name]:
        raise SettingError(
            f"{path}: {name}: {value}: the unit must be {UNITS[name]}, as in {getattr(BEST, name):.3g} {UNITS[name]}"
        )
    try:
        rate = float(number)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise SettingError(f"{path}: {name}: {value} is not a number above 0")
    return rate


def rates_text(kind: str, device: str, measured: Mapping[str, float]) -> str:
    """The text of a file for `read_rates`."""
    lines = {"kind": kind, "device": device, **{name: f"{rate:.4g} {UNITS[name]}" for name, rate in measured.items()}}
    return yaml.safe_dump(lines, sort_keys=False)
