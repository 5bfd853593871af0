"""Which process compiles a run's Triton kernels, and which wait, with a stand-in compiler."""

from types import SimpleNamespace

import pytest
from forked import Forked, ran
from ports import free_port

from qwen35 import preflight
from qwen35.heartbeat import Heartbeat
from qwen35.tools import compilation
from qwen35.tools.compilation import (
    KERNEL_TIMEOUT,
    WAIT_TIMEOUT,
    CompilationError,
    check_compilers,
    common_tiles,
)
from qwen35.tools.doctor.host import ok, wrong

TIMEOUT = 10.0  # seconds, of all groups but the one for waiting

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
heartbeat = SimpleNamespace(at=lambda what, timeout: print("at:", what, timeout, flush=True))
compilation.compiled(settings, text, device, heartbeat, lambda line: print("log:", line, flush=True))
"""


def test_local_rank_0_compiles_and_the_others_wait(tmp_path):
    """Longer than a collective's timeout. All ranks get the same tiles."""
    cache, port = tmp_path / "cache", str(free_port())
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = both | {"TRITON_CACHE_DIR": str(cache)}
    processes = [
        Forked(ran, [RANK, str(tmp_path)], own | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (out.splitlines() for out, _ in outputs)
    waiting = f"at: waiting for local rank 0 of each node to compile the Triton kernels {WAIT_TIMEOUT}"
    assert second == [waiting, "computes with the tiles that fit"]
    assert first[0] == f"at: compiling Triton kernels: 1 of 2 (kernel 0) {KERNEL_TIMEOUT}"
    assert first[1].startswith("log: compiling Triton kernels: 1 of 2, ")
    assert first[2] == f"at: compiling Triton kernels: 2 of 2 (kernel 1) {KERNEL_TIMEOUT}"
    assert first[3].startswith("log: compiling Triton kernels: 2 of 2, ")
    assert first[4] == "log: a kernel of 2 K and 4 V heads of 16 gets a smaller tile"  # of each of two ranks
    assert first[5].startswith("log: Triton kernels: 2 ready in ") and first[5].endswith(f" s, in {cache}")
    assert first[6:] == [waiting, "computes with the tiles that fit"]


def test_tiles_that_differ_between_nodes_are_refused():
    assert common_tiles(["large", None, "large", None]) == "large"
    with pytest.raises(CompilationError, match="rank 2 has small, rank 0 large; "):
        common_tiles(["large", None, "small", None])


def test_waiting_for_another_run_is_logged():
    lines: list[str] = []
    progress = compilation._Progress(11, Heartbeat(), lines.append)
    progress.waiting("4711\n")
    progress.waiting("4711\n")  # too soon for another line
    assert lines == ["waiting for process 4711, which is also compiling Triton kernels, 0 s"]


def test_missing_compilers_are_refused_before_compiling(monkeypatch):
    findings = [ok("C++ compiler", "/usr/bin/g++")]
    monkeypatch.setattr(compilation, "triton", lambda m: findings)
    check_compilers()
    findings.append(wrong("bishengir-compile", "is not on PATH", "install CANN's toolkit whole"))
    with pytest.raises(CompilationError, match=r"^bishengir-compile: is not on PATH -> install CANN's toolkit whole$"):
        check_compilers()
    monkeypatch.setattr(preflight, "init_process", lambda timeout: SimpleNamespace(type="cpu"))
    monkeypatch.setattr(preflight, "compare_nodes", lambda settings, timeout: None)
    monkeypatch.setattr("kernels.triton_ops", lambda chosen: ["causal_conv1d"])
    with pytest.raises(CompilationError):
        preflight.preflight(SimpleNamespace(model=SimpleNamespace(kernels={}), training=SimpleNamespace(timeout=1)))
