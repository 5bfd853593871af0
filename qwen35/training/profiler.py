"""training.profile: steps under the device's profiler, as a trace, a table and a memory snapshot.

<save>/<folder>/step_0000003/rank_00000/
    trace.json       for chrome://tracing or Perfetto (on an NPU below *_ascend_pt, with all else
                     that torch_npu's profiler writes)
    operators.txt    the operators with the largest self time
    memory.pickle    for pytorch.org/memory_viz; with memory_snapshot on an accelerator
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

TABLE_ROWS = 30  # operators of each kind in the table


class Profile:
    """This rank's profile. As a context manager it leaves no half-written files behind."""

    def __init__(self, p: ProfileSettings, save: Path, device: torch.device):
        self.settings, self.device = p, device
        self.is_mine = p.steps > 0 and dist.get_rank() in p.ranks
        self.folder = save / p.folder / f"step_{p.start:07}" / f"rank_{dist.get_rank():05}"
        self.temporary = self.folder.with_name(self.folder.name + ".tmp")
        self.profiler: Any = None  # None while it does not run

    def plan(self, done: int) -> str:
        """What will be profiled in a run that has done so many steps, or why nothing will."""
        p = self.settings
        steps = f"profile of steps {p.start} to {p.start + p.steps - 1}"
        if done >= p.start - 1:
            return f"no {steps}: the run goes on after step {done}"
        memory = ", with memory" if has_memory_history(self.device) else ", allocations in the trace"
        memory *= p.memory_snapshot
        return f"{steps} on ranks {', '.join(map(str, p.ranks))}{memory}: {self.folder.parent}"

    def before(self, step: int) -> None:
        """Start the profiler one step early: the first profiled step is slow, and left out."""
        if not self.is_mine or step != self.settings.start - 1:
            return
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        if self.settings.memory_snapshot and has_memory_history(self.device):
            record_memory(self.device, True)
        self.profiler = make_profiler(self.device, self.settings.steps, self.settings.memory_snapshot, self.temporary)
        self.profiler.start()

    def after(self, step: int) -> None:
        """After the last profiled step, write the files. Raises OSError, UserError."""
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
            shutil.rmtree(self.folder, ignore_errors=True)  # an earlier run's profile
            self.temporary.rename(self.folder)

    def _trace(self) -> Any:
        for file in self.temporary.glob("**/trace*.json"):
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except ValueError:  # truncated
                continue
        # torch_npu's profiler only prints what went wrong.
        raise UserError(
            f"{self.folder}: the profiler has written no whole trace; look for its messages above, and for room on the disk"
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
    """A Chrome trace -> for each category of events, the names with the largest self time."""
    events = trace["traceEvents"] if isinstance(trace, Mapping) else trace
    rows = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    threads = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") != "Trace":
            threads[event["pid"], event.get("tid")].append(event)
    for inside in threads.values():
        for event, self_time in self_times(inside):
            kinds[str(event.get("cat") or rows.get(event["pid"], event["pid"]))][event["name"]].append(self_time)
    lines = []
    for kind, names in sorted(kinds.items()):
        total = sum(map(sum, names.values())) or 1.0
        lines.append(f"{kind}: {total / 1e3:.3f} ms\n{'self ms':>12}{'share':>8}{'calls':>9}{'mean us':>12}  name")
        for name, times in sorted(names.items(), key=lambda item: -sum(item[1]))[:TABLE_ROWS]:
            spent = sum(times)
            lines.append(f"{spent / 1e3:12.3f}{spent / total:8.1%}{len(times):9}{spent / len(times):12.1f}  {name}")
        lines.append("")
    return "\n".join(lines)


def self_times(events: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """A thread's events -> each with its microseconds, less its children's of its category."""
    times: list[list[Any]] = []  # [event, microseconds]
    open_: dict[Any, list[tuple[float, int]]] = defaultdict(list)  # category -> (end, index in `times`)
    for event in sorted(events, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
        begin, time, stack = float(event["ts"]), float(event["dur"]), open_[event.get("cat")]
        while stack and stack[-1][0] <= begin:
            stack.pop()
        if stack:
            times[stack[-1][1]][1] -= min(time, stack[-1][0] - begin)
        stack.append((begin + time, len(times)))
        times.append([event, time])
    return [(event, time) for event, time in times]
