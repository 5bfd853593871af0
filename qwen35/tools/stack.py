"""The torch_npu and triton-ascend for each CANN: the rows of scripts/requirements/versions.txt.

`python -m qwen35.tools.stack` prints for scripts/install.sh: the row, a message about
kernels or an empty line, the pins.
"""

import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen35.errors import Parser, SettingError, complain

TABLE = Path(__file__).parents[2] / "scripts/requirements/versions.txt"
# Below ASCEND_HOME_PATH, the most reliable first. CANN's installation guides of 8.5.0 and 9.0.0
# ("Querying the Software Package Version") name the first file. In the other files, of older
# releases, Version is a component's, and version_dir is CANN's.
VERSION_FILES = (
    ("{arch}-linux/ascend_toolkit_install.info", r"^version=(\S+)"),
    ("compiler/version.info", r"^version_dir=(\d\S*)"),
    ("compiler/version.info", r"^Version=(\S+)"),
    ("runtime/version.info", r"^Version=(\S+)"),
)
WITHOUT_TRITON = (
    "model.kernels.gated_delta_rule=native model.kernels.causal_conv1d=native model.kernels.rms_norm_gated=torch_npu"
)

# the oldest and the newest release on which the tests have run
TESTED = {"torch": ("2.7.1", "2.13"), "transformers": ("5.2", "5.23")}


def release(version: str) -> tuple[int, ...]:
    """ "2.7.1.post11" -> (2, 7, 1); "8.5.0.alpha003" -> (8, 5, 0); "x" -> ()."""
    found = re.match(r"\d+(\.\d+)*(?=[.+-]|$)", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def is_tested(package: str, version: str) -> bool:
    oldest, newest = map(release, TESTED[package])
    return oldest <= release(version) and release(version)[: len(newest)] <= newest


def first_match(file: Path, pattern: str) -> str | None:
    """The pattern's first group in a text file, ^ at any line; None without file or match."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else None


@dataclass(frozen=True)
class Stack:
    cann: str  # major.minor
    torch_npu: str
    triton_ascend: str
    is_on_index: bool  # whether pip's index has that triton-ascend

    def no_triton(self, python: tuple[int, ...]) -> tuple[str, str] | None:
        """Why an installation has no triton-ascend, and what to do; None if it has one."""
        if self.is_on_index and python[:2] < (3, 12):
            return None
        choices = f"choose the slow operators: {WITHOUT_TRITON}"
        if self.is_on_index:
            return f"triton-ascend {self.triton_ascend} has no wheel for Python 3.12", f"use Python 3.10, or {choices}"
        fact = f"triton-ascend {self.triton_ascend}, the version for CANN {self.cann}, is not on pip's index"
        return fact, f"install it from its release page, or {choices}"

    def pins(self, lock: str) -> str:
        """The lock file, with the torch, torch_npu and triton-ascend of this row."""
        torch = ".".join(map(str, release(self.torch_npu)))
        lock = re.sub(r"^torch==[0-9.]+", f"torch=={torch}", lock, flags=re.MULTILINE)
        lock = re.sub(r"^torch-npu==\S+", f"torch-npu=={self.torch_npu}", lock, flags=re.MULTILINE)
        return lock if self.is_on_index else re.sub(r"^triton-ascend==.*\n", "", lock, flags=re.MULTILINE)


def stacks() -> list[Stack]:
    rows = [line.split() for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [Stack(cann, torch_npu, triton, index == "index") for cann, torch_npu, triton, index in rows]


def of_cann(version: str) -> list[Stack]:
    return [stack for stack in stacks() if release(stack.cann) == release(version)[:2]]


def of_torch_npu(version: str) -> Stack | None:
    return next((stack for stack in stacks() if stack.torch_npu == version.partition("+")[0]), None)


def supported() -> str:
    return ", ".join(dict.fromkeys(stack.cann for stack in stacks()))


def cann_version(home: Path) -> str | None:
    found = (first_match(home / name.format(arch=platform.machine()), pattern) for name, pattern in VERSION_FILES)
    return next((version for version in found if version), None)


def choose(cann: str, torch_npu: str) -> Stack:
    rows = of_cann(cann)
    if not rows:
        raise SettingError(f"CANN {cann}: no torch_npu is known for it; there are pins for CANN {supported()}")
    for stack in rows:
        if torch_npu in ("", stack.torch_npu):
            return stack
    choices = ", ".join(stack.torch_npu for stack in rows)
    raise SettingError(f"TORCH_NPU={torch_npu}: for CANN {cann} choose from {choices}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m qwen35.tools.stack", description=__doc__)
    parser.add_argument("lock", type=Path, help="the lock file, scripts/requirements/npu-arm.txt")
    parser.add_argument("--home", default="", help="CANN's folder, ASCEND_HOME_PATH; default: none")
    parser.add_argument("--cann", default="", help="CANN_VERSION; default: the version found there")
    parser.add_argument("--torch_npu", default="", help="TORCH_NPU; default: the first for this CANN")
    parser.add_argument("--elsewhere", action="store_true", help="the pins are not for this machine")
    args = parser.parse_args(argv)
    found = cann_version(Path(args.home)) if args.home else None
    try:
        if args.cann and found and not args.elsewhere and release(args.cann)[:2] != release(found)[:2]:
            raise SettingError(f"CANN_VERSION={args.cann}, but {args.home} is CANN {found}: leave CANN_VERSION empty")
        if args.home and not found and not args.cann:
            raise SettingError(f"{args.home} does not say its version: set CANN_VERSION to that of this CANN")
        stack = choose(args.cann or found or stacks()[0].cann, args.torch_npu)
    except SettingError as error:
        return complain(error, "install.sh: ")
    default = "the default, since no CANN is found; set CANN_VERSION for another"
    origin = "CANN_VERSION" if args.cann else args.home or default
    missing = stack.no_triton(sys.version_info[:3])
    print(f"{stack.cann} {stack.torch_npu} {origin}")
    print(": ".join(missing or ()))
    print(stack.pins(args.lock.read_text(encoding="utf-8")), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
