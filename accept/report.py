"""The report: Markdown to read or to paste into an issue, and the same as JSON. It tells no paths, addresses or secrets."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS)_?KEY")
PATH = re.compile(r"(?:file://|(?<![\w/.:~]))~?(?:/[\w.@+-]+)+/([\w.@+-]+)")
ADDRESS = re.compile(
    r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{0,4}(?![\w:])"
)
# slower: than rehearse assumes; told: there is nothing to compare with
Status = Literal["held", "off", "slower", "told"]


@dataclass(frozen=True)
class Row:
    what: str
    status: Status
    found: str
    wanted: str = ""
    rate: str = ""  # of rates.yaml, that `value` is
    value: float = 0.0


def clean(text: str, environment: Mapping[str, str]) -> str:
    """Of a path stays its last part, of an address and a secret nothing; one line, with no end of a table's cell in it."""
    for name, value in environment.items():
        if SECRET.search(name.upper()) and len(value) > 3:
            text = text.replace(value, "<secret>")
    return " ".join(ADDRESS.sub("<address>", PATH.sub(r"…/\1", text)).replace("|", "/").split())


@dataclass
class Report:
    host: str
    date: str
    # what accept.machine finds
    kind: str = "?"  # torch's word for the devices
    device: str = "of an unknown kind"  # "Ascend910B2"
    is_apart: bool = False  # whether that is an accelerator
    rows: dict[str, list[Row]] = field(default_factory=dict)  # by check
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, check: str, rows: list[Row], seconds: float, environment: Mapping[str, str]) -> None:
        of_row = ("what", "found", "wanted")
        self.rows[check] = [Row(**vars(r) | {k: clean(getattr(r, k), environment) for k in of_row}) for r in rows]
        self.seconds[check] = seconds

    def count(self, *checks: str) -> Counter[str]:
        return Counter(row.status for check in checks or self.rows for row in self.rows[check])

    @property
    def rates(self) -> dict[str, float]:
        """For rates.yaml; of what was measured several times the lowest."""
        rated = sorted((row for rows in self.rows.values() for row in rows if row.rate), key=lambda row: -row.value)
        return {row.rate: row.value for row in rated}

    @property
    def verdict(self) -> str:
        counts = self.count()
        words = f"{counts['held']} held, {counts['off']} off, {counts['slower']} slower than assumed"
        return words + ("" if self.is_apart else "; a CPU: no speed is compared, and none of it speaks for an NPU")

    def json(self) -> dict[str, object]:
        return asdict(self) | {"rates": self.rates, "verdict": self.verdict}

    def markdown(self) -> str:
        lines = [
            f"# accept: {self.host}, {self.date}, {self.device}\n",
            "| | what | found | wanted |",
            "|---|---|---|---|",
        ]
        for name, rows in self.rows.items():
            lines.append(f"| | **{name}**, {self.seconds[name]:.0f} s | | |")
            lines += [f"| {r.status} | {r.what} | {r.found} | {r.wanted} |" for r in rows]
        return "\n".join([*lines, "", self.verdict, ""])
