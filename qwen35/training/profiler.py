"""training.profile: some steps of some ranks under the device's profiler, as a trace, a table and a picture of the memory.

<save>/<folder>/step_0000003/rank_00000/trace.json       for chrome://tracing or Perfetto (below *_ascend_pt on an NPU,
                                                         with all else that torch_npu's profiler writes)
                                        operators.txt    the operators that took most time of their own
                                        memory.pickle    with memory_snapshot, on an accelerator; a snapshot as
                                                         pytorch.org/memory_viz draws it
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from qwen35.config.schema import ProfileSettings
from qwen35.device import has_memory_history, make_profiler, record_memory, save_memory
from qwen35.errors import UserError, naming

TOP = 30  # operators of each kind in the table


class Profile:
    """Of this rank. As a context it leaves nothing half-written behind."""

    def __init__(self, p: ProfileSettings, save: Path, device: torch.device):
        self.settings, self.device = p, device
        self.is_mine = p.steps > 0 and dist.get_rank() in p.ranks
        self.folder = save / p.folder / f"step_{p.start:07}" / f"rank_{dist.get_rank():05}"
        self.temporary = self.folder.with_name(self.folder.name + ".tmp")
        self.profiler: Any = None  # while it runs

    def plan(self, done: int) -> str:
        """For the start of a run that has done so many steps: what will be profiled, or why not."""
        p = self.settings
        steps = f"profile of steps {p.start} to {p.start + p.steps - 1}"
        if done >= p.start - 1:
            return f"no {steps}: the run goes on after step {done}"
        memory = (
            ""
            if not p.memory_snapshot
            else ", with memory"
            if has_memory_history(self.device)
            else ", allocations in the trace"
        )
        return f"{steps} on ranks {', '.join(map(str, p.ranks))}{memory}: {self.folder.parent}"

    def before(self, step: int) -> None:
        """Begin, one step early: the first one under a profiler is slower than the others, and is left out."""
        if not self.is_mine or step != self.settings.start - 1:
            return
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        if self.settings.memory_snapshot and has_memory_history(self.device):
            record_memory(self.device, True)
        self.profiler = make_profiler(self.device, self.settings.steps, self.settings.memory_snapshot, self.temporary)
        self.profiler.start()

    def after(self, step: int) -> None:
        """Once all is profiled, write it. Raises OSError, and UserError if there is no trace."""
        if self.profiler is None:
            return
        self.profiler.step()
        if step < self.settings.start + self.settings.steps - 1:
            return
        self.profiler.stop()
        self.profiler = None
        with naming(self.folder):
            (self.temporary / "operators.txt").write_text(operator_table(self._trace()), encoding="utf-8")
            if self.settings.memory_snapshot and has_memory_history(self.device):
                save_memory(self.device, self.temporary / "memory.pickle")
                record_memory(self.device, False)
            shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier run
            self.temporary.rename(self.folder)

    def _trace(self) -> Any:
        for file in self.temporary.glob("**/trace*.json"):
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except ValueError:  # cut off
                continue
        # a profiler may say what went wrong, and go on: torch_npu's does
        raise UserError(
            f"{self.folder}: the profiler has written no whole trace: is there room, and what stands above?"
        )

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler is not None and error is None:
            self.profiler.stop()
        if self.is_mine:
            shutil.rmtree(self.temporary, ignore_errors=True)


def operator_table(trace: Mapping[str, Any] | list[dict[str, Any]]) -> str:
    """Of a Chrome trace: for each kind of event the names that took most time, what is inside of them left out."""
    events = trace["traceEvents"] if isinstance(trace, Mapping) else trace
    rows = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    threads = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") != "Trace":
            threads[event["pid"], event.get("tid")].append(event)
    for inside in threads.values():
        for event, own in own_times(inside):
            kinds[str(event.get("cat") or rows.get(event["pid"], event["pid"]))][event["name"]].append(own)
    lines = []
    for kind, names in sorted(kinds.items()):
        total = sum(map(sum, names.values())) or 1.0
        lines.append(f"{kind}: {total / 1e3:.3f} ms\n{'own ms':>12}{'share':>8}{'calls':>9}{'mean us':>12}  name")
        for name, times in sorted(names.items(), key=lambda item: -sum(item[1]))[:TOP]:
            own = sum(times)
            lines.append(f"{own / 1e3:12.3f}{own / total:8.1%}{len(times):9}{own / len(times):12.1f}  {name}")
        lines.append("")
    return "\n".join(lines)


def own_times(events: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Events of one thread -> each with its microseconds, less those of the events of its own kind that begin within it."""
    own: list[list[Any]] = []  # [event, microseconds]
    open_: dict[Any, list[tuple[float, int]]] = defaultdict(
        list
    )  # of each kind: when they end, and their place in `own`
    for event in sorted(events, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
        begin, time, stack = float(event["ts"]), float(event["dur"]), open_[event.get("cat")]
        while stack and stack[-1][0] <= begin:
            stack.pop()
        if stack:
            own[stack[-1][1]][1] -= min(time, stack[-1][0] - begin)
        stack.append((begin + time, len(own)))
        own.append([event, time])
    return [(event, time) for event, time in own]
