"""The report, as Markdown and JSON, for an issue: it holds no paths, addresses or secrets."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS)_?KEY")
PATH = re.compile(r"(?:file://|(?<![\w/.:~]))~?(?:/[\w.@+-]+)+/([\w.@+-]+)")
ADDRESS = re.compile(
    r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{0,4}(?![\w:])"
)
# slower: than make rehearse assumes; info: a figure without one to compare it with
Status = Literal["held", "off", "slower", "info"]


@dataclass(frozen=True)
class Row:
    what: str
    status: Status
    found: str
    wanted: str = ""
    rate: str = ""  # the name in rates.yaml of what `value` is
    value: float = 0.0


def clean(text: str, environment: Mapping[str, str]) -> str:
    """One line without secrets, addresses, `|` (the end of a table's cell) and folders of paths."""
    for name, value in environment.items():
        if SECRET.search(name.upper()) and len(value) > 3:
            text = text.replace(value, "<secret>")
    return " ".join(ADDRESS.sub("<address>", PATH.sub(r"…/\1", text)).replace("|", "/").split())


@dataclass
class Report:
    host: str
    date: str
    # found by accept/machine.py
    kind: str = "?"  # torch's name of the device type
    device: str = "unknown device"  # "Ascend910B2"
    is_apart: bool = False  # whether it is an accelerator
    rows: dict[str, list[Row]] = field(default_factory=dict)  # by check
    seconds: dict[str, float] = field(default_factory=dict)  # by check

    def add(self, check: str, rows: list[Row], seconds: float, environment: Mapping[str, str]) -> None:
        texts = ("what", "found", "wanted")
        self.rows[check] = [Row(**asdict(r) | {k: clean(getattr(r, k), environment) for k in texts}) for r in rows]
        self.seconds[check] = seconds

    def count(self, *checks: str) -> Counter[str]:
        return Counter(row.status for check in checks or self.rows for row in self.rows[check])

    @property
    def rates(self) -> dict[str, float]:
        """For rates.yaml: the lowest measurement of each."""
        rated = sorted((row for rows in self.rows.values() for row in rows if row.rate), key=lambda row: -row.value)
        return {row.rate: row.value for row in rated}

    @property
    def verdict(self) -> str:
        counts = self.count()
        text = f"{counts['held']} held, {counts['off']} off, {counts['slower']} slower than assumed"
        return text if self.is_apart else f"{text}; on a CPU no speed is compared, and nothing is proved for NPUs"

    def write(self, folder: Path) -> Path:
        """Write <host>-<date>.md and .json. Returns the path of the former."""
        path = folder / f"{re.sub(r'[^A-Za-z0-9_-]', '-', self.host)}-{self.date}.md"
        folder.mkdir(parents=True, exist_ok=True)
        document = asdict(self) | {"rates": self.rates, "verdict": self.verdict}
        path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        lines = [f"# accept: {self.host}, {self.date}, {self.device}", ""]
        lines += ["| | what | found | wanted |", "|---|---|---|---|"]
        for name, rows in self.rows.items():
            lines.append(f"| | **{name}**, {self.seconds[name]:.0f} s | | |")
            lines += [f"| {r.status} | {r.what} | {r.found} | {r.wanted} |" for r in rows]
        path.write_text("\n".join([*lines, "", self.verdict, ""]), encoding="utf-8")
        return path
