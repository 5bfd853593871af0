"""training.profile with torch_npu's real profiler, on stand-ins for CANN: host operators only.

CANN would write the device's part, which is missing: torch_npu reports that and traces the rest.
"""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch_npu

from rehearse import stand_ins

PROGRAM = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
import kernels.npu
from qwen35.training.profiler import Profile
from qwen35.config.schema import ProfileSettings

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
settings = ProfileSettings(steps=2, start=3, memory_snapshot=sys.argv[2] == "memory")
with Profile(settings, Path(sys.argv[1]), torch.device("npu", 0)) as profile:
    print(profile.plan(0))
    for step in range(1, 7):
        profile.before(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        profile.after(step)
"""


def run(folder: Path, memory: str) -> subprocess.CompletedProcess:
    site = Path(torch_npu.__file__).parents[1]
    code = stand_ins.source(site).splitlines()
    code = [line for line in code if " aclprofCreateConfig(" not in line]
    code.append("void *aclprofCreateConfig(void) { return &something; }")
    code.append("long halGetAPIVersion(int *version) { *version = 0x72316; return 0; }")
    code.append("long halGetDeviceInfo(unsigned device, int of, int what, long *value) { *value = 1; return 0; }")
    (folder / "more.c").write_text("\n".join(code) + "\n")
    for name in ("libmsprofiler.so", "libascend_hal.so"):
        command = [
            "gcc",
            "-shared",
            "-fPIC",
            "-w",
            "-O0",
            f"-Wl,-soname,{name}",
            "-o",
            folder / name,
            folder / "more.c",
        ]
        subprocess.run(command, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": f"{folder}:{os.environ['LD_LIBRARY_PATH']}"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder / "run"), memory],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_profile_of_the_real_torch_npu(tmp_path):
    done = run(tmp_path, "memory")
    assert done.returncode == 0, done.stderr
    assert f"profile of steps 3 to 4 on ranks 0, with memory: {tmp_path}/run/profile/step_0000003" in done.stdout
    folder = tmp_path / "run" / "profile" / "step_0000003" / "rank_00000"
    [trace] = folder.glob("*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json")
    names = [event["name"] for event in json.loads(trace.read_text()) if event.get("ph") == "X"]
    assert names.count("aten::mm") == 2 and sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert (folder / "memory.pickle").stat().st_size > 0
    assert not folder.with_name("rank_00000.tmp").exists()


def test_without_its_trace_the_run_says_so(tmp_path):
    """torch_npu's profiler prints errors and continues."""
    environment = os.environ.copy()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "run"), "none"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "rank_00000: the profiler has written no whole trace" in done.stderr
    assert not list((tmp_path / "run").glob("profile/*/*"))


def test_the_older_release_takes_the_same():
    """What qwen35/device.py calls and passes exists in torch-npu 2.7.1's wheel, NPU_OLD_WHEEL."""
    wanted = {
        "profiler/profiler.py": {
            "profile.__init__": {"schedule", "on_trace_ready", "profile_memory"},
            "tensorboard_trace_handler": {"dir_name", "worker_name"},
            "profile.start": set(),
            "profile.step": set(),
            "profile.stop": set(),
        },
        "profiler/scheduler.py": {"Schedule.__init__": {"wait", "warmup", "active", "repeat"}},
        "npu/memory.py": {"_record_memory_history": {"enabled"}, "_dump_snapshot": {"filename"}},
    }
    with zipfile.ZipFile(os.environ["NPU_OLD_WHEEL"]) as wheel:
        for file, functions in wanted.items():
            tree = ast.parse(wheel.read(f"torch_npu/{file}"))
            found = {}
            for node in tree.body:
                inside = node.body if isinstance(node, ast.ClassDef) else [node]
                prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                for f in inside:
                    if isinstance(f, ast.FunctionDef):
                        found[prefix + f.name] = {a.arg for a in (*f.args.args, *f.args.kwonlyargs)}
            for name, arguments in functions.items():
                assert arguments <= found[name], (file, name)
