"""The rates of an NPU and its links: stated ones, from two ends that are both unproved, or those that make accept has measured.

The quick end: every rate at its peak. The slow end: rates that were measured by others or are assumed. Sources:
- arithmetic: CANN's platform file of Ascend 910B2C has 24 cube cores of 16 x 16 x 16 products at 1.8 GHz, that is 354 TFLOPS;
  a public measurement (the README of limulidae) reached 328 with one large matmul in bf16. Over a step 40% is assumed.
- memory: the same file has 32 bytes a cycle and core, 1.38 TB/s; the same measurement 0.64 TB/s for an elementwise operator.
- within a node: the same measurement has 149 GB/s for an all-gather of 8 NPUs, 72 for an all-reduce.
- between nodes: a port of 200 Gb/s an NPU, 25 GB/s; 60% of it assumed.
- host: from 3 to 15 microseconds an operator, assumed.
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
    flops: float  # a second
    memory: float  # bytes a second
    within: float  # a node, bytes a second and NPU
    between: float  # nodes
    host: float  # seconds an operator


QUICK = Rates(354e12, 1.38e12, 149e9, 25e9, 3e-6)
SLOW = Rates(0.4 * 354e12, 0.64e12, 72e9, 0.6 * 25e9, 15e-6)
UNITS = {"flops": "FLOP/s", "memory": "B/s", "within": "B/s", "between": "B/s", "host": "s"}  # host: of an operator


@dataclass(frozen=True)
class Ends:
    """Between which a step's time is told. A rate that was measured is the same at both."""

    quick: Rates = QUICK
    slow: Rates = SLOW
    source: str = "rates stated, nothing measured"


def read_rates(path: Path, kind: str) -> Ends:
    """What a rates.yaml has measured, and for the rest what is stated. kind: the device type that is rehearsed.

    Raises SettingError for a file that is not whole, a name or unit that is not known, and rates of another device type.
    """
    text = read_text(path, SettingError, "no such file of rates; make accept writes one on a machine with NPUs")
    found = parse_yaml(text, str(path))
    known = ("kind", "device", *UNITS)
    if not isinstance(found, dict) or not {"kind", "device"} <= found.keys() or len(found) < 3:
        raise SettingError(f"{path}: not a file of rates: it names kind, device and some of {', '.join(UNITS)}")
    if unknown := next((name for name in found if name not in known), None):
        raise SettingError(f"{path}: {unknown} is not known; there are {', '.join(known)}")
    if found["kind"] != kind:
        raise SettingError(f"{path}: the rates of a {found['kind']} ({found['device']}) say nothing of an {kind}")
    rates = {name: _number(path, name, found[name]) for name in UNITS if name in found}
    rest = [name for name in UNITS if name not in rates]
    source = f"{', '.join(rates)} as measured on {found['device']}" + (f"; {', '.join(rest)} stated" if rest else "")
    return Ends(replace(QUICK, **rates), replace(SLOW, **rates), source)


def _number(path: Path, name: str, value: object) -> float:
    """Of "2.9e+14 FLOP/s"."""
    number, _, unit = str(value).partition(" ")
    if unit != UNITS[name]:
        raise SettingError(
            f"{path}: {name}: {value}: its unit is {UNITS[name]}, as in {getattr(QUICK, name):.3g} {UNITS[name]}"
        )
    try:
        rate = float(number)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise SettingError(f"{path}: {name}: {value} is not a number above 0")
    return rate


def rates_text(kind: str, device: str, measured: Mapping[str, float]) -> str:
    """What `read_rates` reads."""
    lines = {"kind": kind, "device": device, **{name: f"{rate:.4g} {UNITS[name]}" for name, rate in measured.items()}}
    return yaml.safe_dump(lines, sort_keys=False)
