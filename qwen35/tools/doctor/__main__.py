"""Check this machine for a recipe: `python -m qwen35.tools.doctor CONFIG [a.b=c …]`.

Prints a line for each finding. Exit status 1 if something is wrong.
"""

import sys
from collections.abc import Sequence

from qwen35.errors import Parser
from qwen35.tools.doctor.ascend import ascend
from qwen35.tools.doctor.host import Finding, Machine, installation, note, ok, wrong

NEEDED = "an NPU run would still need:"


def examine(m: Machine, values: Sequence[str], config: str, overrides: Sequence[str] = ()) -> list[Finding]:
    """All findings for a run on the device of this installation.

    values: what is wrong with env.sh, a line for each variable.
    """
    found = [wrong("env.sh", line, "set it there, or on the command line") for line in values]
    found = [*(found or [ok("env.sh", "every value is allowed")]), *installation(m)]
    is_usable = found[-1].subject == "import torch" and found[-1].status == "ok"
    found += ascend(m) if m.accelerator else []
    if not is_usable:
        return [*found, note("recipe", f"{config} is not checked: that needs an installation")]
    from qwen35.tools.doctor.recipe import host, recipe

    return [*found, *host(m), *recipe(m, config, list(overrides))]


def still_needed(m: Machine) -> list[Finding]:
    """What an NPU run would need beyond this CPU installation: notes, since nothing is wrong."""
    return [f._replace(status="note") for f in ascend(m) if f.status == "wrong"]


def lines(found: Sequence[Finding]) -> list[str]:
    width = max(len(f.subject) for f in found)
    return [f"{f.status:5}  {f.subject:{width}}  {f.fact}" + f" -> {f.todo}" * bool(f.todo) for f in found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m qwen35.tools.doctor", description=__doc__)
    parser.add_argument("config", help="the recipe of the run, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    parser.add_argument("--accelerator", help="torch's device type of this installation; default: the CPU")
    parser.add_argument("--wrong", action="append", default=[], metavar="LINE", help="a wrong value of env.sh")
    args = parser.parse_args(argv)
    m = Machine(args.accelerator)
    findings = examine(m, args.wrong, args.config, args.overrides)
    print("\n".join(lines(findings)))
    if not m.accelerator:
        needed = still_needed(m)
        print(f"\n{NEEDED}{'' if needed else ' nothing but make install DEVICE=npu'}")
        print("\n".join(lines(needed)) if needed else "")
    count = sum(f.status == "wrong" for f in findings)
    has_model = all(f.status == "ok" for f in findings if f.subject == "recipe")
    if m.accelerator and has_model and not count:  # compile the kernels as the run does, on its first device
        from qwen35.tools import compilation

        print(flush=True)
        count += compilation.show(args.config, args.overrides)
    device = "NPUs" if m.accelerator else "the CPU"
    print(f"\n{count or 'nothing'} {'are' if count > 1 else 'is'} wrong for a run on {device}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
