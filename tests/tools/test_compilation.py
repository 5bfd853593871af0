"""Who compiles a run's Triton kernels, and who waits: real processes, and a stand-in for what compiles."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from stand_in import ROOT, free_port

from qwen35 import preflight
from qwen35.heartbeat import Heartbeat
from qwen35.tools import compilation
from qwen35.tools.compilation import A_KERNEL, OTHERS, CompilationError, agreed, check_compilers
from qwen35.tools.doctor.machine import ok, wrong

TIMEOUT = 10.0  # seconds, of all groups but the one that waits

RANK = f"""
import os, sys, time
from pathlib import Path
from types import ModuleType, SimpleNamespace
import kernels
from qwen35.tools import compilation
from qwen35.config.load import load_settings
from qwen35.device import init_process

folder, rank = Path(sys.argv[1]), os.environ["RANK"]

def compile_kernels(chosen, layer, device, begins, falls):
    for i in range(2):
        begins(f"kernel {{i}}")
        time.sleep({TIMEOUT / 2 + 1})
    falls(f"a kernel of {{layer.key_heads}} K and {{layer.value_heads}} V heads of {{layer.Dk}} gets a smaller tile")
    return "the tiles that fit", {{"kernel 0": 4.0, "kernel 1": 4.0}}

stand_in = ModuleType("kernels.triton.first_run")
stand_in.compile_kernels, stand_in.with_tiles = compile_kernels, lambda chosen, tiles: print("computes with", tiles)
stand_in.KERNEL_COUNTS, stand_in.Layer = {{"causal_conv1d": 2}}, lambda *sizes: SimpleNamespace(
    **dict(zip(("key_heads", "value_heads", "Dk", "Dv", "dtype"), sizes, strict=True)))
stand_in.TooLargeError = RuntimeError
sys.modules |= {{"kernels.triton": ModuleType("kernels.triton"), "kernels.triton.first_run": stand_in}}
kernels.triton_ops = lambda chosen: ["causal_conv1d"]

(folder / rank).touch()
while len(list(folder.glob("[01]"))) < 2:
    time.sleep(0.05)
device = init_process({TIMEOUT})
settings = load_settings("configs/tiny.yaml", ["parallel.ulysses_parallel_size=2"])
text = SimpleNamespace(linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=16, linear_value_head_dim=32)
heartbeat = SimpleNamespace(at=lambda what, patience: print("at:", what, patience, flush=True))
compilation.compiled(settings, text, device, heartbeat, lambda line: print("told:", line, flush=True))
"""


def test_local_rank_0_compiles_and_the_others_wait(tmp_path):
    """Longer than a collective may take. All get the same tiles."""
    cache, port = tmp_path / "cache", str(free_port())
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = os.environ | both | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            env=own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    first, second = (out.splitlines() for out, _ in told)
    waiting = f"at: waiting for the local ranks 0 to compile the Triton kernels {OTHERS}"
    assert second == [waiting, "computes with the tiles that fit"]
    assert first[0] == f"at: compiling Triton kernels: 1 of 2 (kernel 0) {A_KERNEL}"
    assert first[1].startswith("told: compiling Triton kernels: 1 of 2, ")
    assert first[2] == f"at: compiling Triton kernels: 2 of 2 (kernel 1) {A_KERNEL}"
    assert first[3].startswith("told: compiling Triton kernels: 2 of 2, ")
    assert first[4] == "told: a kernel of 2 K and 4 V heads of 16 gets a smaller tile"  # of each of two ranks
    assert first[5].startswith("told: Triton kernels: 2 ready in ") and first[5].endswith(f" s, in {cache}")
    assert first[6:] == [waiting, "computes with the tiles that fit"]


def test_machines_whose_tiles_differ():
    assert agreed(["large", None, "large", None]) == "large"
    with pytest.raises(CompilationError, match="rank 2 has small, rank 0 large; install the same CANN"):
        agreed(["large", None, "small", None])


def test_who_waits_for_another_run_says_so():
    told: list[str] = []
    progress = compilation._Progress(11, Heartbeat(), told.append)
    progress.waits("4711\n")
    progress.waits("4711\n")  # just told
    assert told == ["waiting for process 4711, which compiles Triton kernels too, 0 s"]


def test_what_is_missing_is_said_before(monkeypatch):
    findings = [ok("C++ compiler", "/usr/bin/g++")]
    monkeypatch.setattr(compilation, "triton", lambda m: findings)
    check_compilers()
    findings.append(wrong("bishengir-compile", "is not on PATH", "install CANN's toolkit whole"))
    with pytest.raises(CompilationError, match=r"^bishengir-compile: is not on PATH -> install CANN's toolkit whole$"):
        check_compilers()
    monkeypatch.setattr(preflight, "init_process", lambda: SimpleNamespace(type="cpu"))
    monkeypatch.setattr("kernels.triton_ops", lambda chosen: ["causal_conv1d"])
    with pytest.raises(CompilationError):
        preflight.preflight(SimpleNamespace(model=SimpleNamespace(kernels={})))
