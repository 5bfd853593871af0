"""training.profile: steps under the device's profiler, as a trace, a table and a memory snapshot.

<save>/<folder>/step_0000003/rank_00000/
    trace.json       for chrome://tracing or Perfetto
    operators.txt    the operators with the largest self time
    memory.pickle    for pytorch.org/memory_viz; with memory_snapshot on an accelerator

On an NPU torch_npu's profiler writes the first two below *_ascend_pt, as trace_view.json and
op_statistic.csv.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen35.config.schema import ProfileSettings
from qwen35.device import has_own_memory, make_profiler, record_memory, save_memory
from qwen35.errors import UserError, naming


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
        memory = ", with memory" if has_own_memory(self.device) else ", allocations in the trace"
        memory *= p.memory_snapshot
        return f"{steps} on ranks {', '.join(map(str, p.ranks))}{memory}: {self.folder.parent}"

    def before(self, step: int) -> None:
        """Start the profiler one step early: the first profiled step is slow, and left out."""
        if not self.is_mine or step != self.settings.start - 1:
            return
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        if self.settings.memory_snapshot and has_own_memory(self.device):
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
            self._check_trace()
            if self.settings.memory_snapshot and has_own_memory(self.device):
                save_memory(self.device, self.temporary / "memory.pickle")
                record_memory(self.device, False)
            shutil.rmtree(self.folder, ignore_errors=True)  # an earlier run's profile
            self.temporary.rename(self.folder)

    def _check_trace(self) -> None:
        """Raises UserError without a whole trace: torch_npu only prints what went wrong."""
        for file in self.temporary.glob("**/trace*.json"):
            try:
                json.loads(file.read_text(encoding="utf-8"))
                return
            except ValueError:  # truncated
                continue
        raise UserError(
            f"{self.folder}: the profiler has written no whole trace; look for its messages above, and for room on the disk"
        )

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if self.profiler is not None and kind is None:
            self.profiler.stop()
        if self.is_mine:
            shutil.rmtree(self.temporary, ignore_errors=True)
