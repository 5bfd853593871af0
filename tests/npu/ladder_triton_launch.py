"""Rung 5, launching: the first run of all kernels, and several processes that share a cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toolkit
import torch_npu

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("triton_launch.py")

# A stand-in C++ compiler: writes half of the header, then waits. Including it requires all of it.
COMPILER = """#!/usr/bin/env bash
while (($#)); do
    case $1 in
        -o) out=$2 ;;
        -x) header=1 ;;
        -I*) if [[ -e ${1#-I}/precompiled.h.gch ]]; then included=$(<"${1#-I}/precompiled.h.gch"); fi ;;
    esac
    shift
done
if [[ -n ${header:-} ]]; then
    printf half >"$out"
    echo "is writing"
    until [[ -e $GO_ON ]]; do sleep 0.02; done
    echo " and half" >>"$out"
elif [[ -z ${included:-} || $included == "half and half" ]]; then
    touch "$out"
else
    echo "included: $included" >&2
    exit 1
fi
"""
# what triton-ascend does at a kernel's first launch, before it loads the compiled launcher
LAUNCHER = """
import contextlib, os, sys
from pathlib import Path
home = os.environ.pop("ASCEND_HOME_PATH")
from triton.backends.ascend.driver import generate_npu_header_src, make_npu_launcher_stub
import torch_npu
from qwen35.triton_cache import cache_folder, compiling
os.environ["ASCEND_HOME_PATH"] = home
held = compiling(cache_folder(), lambda who: print("waits", flush=True))
with held if sys.argv[1] == "locked" else contextlib.nullcontext():
    make_npu_launcher_stub(generate_npu_header_src(), f"a kernel {sys.argv[2]}")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    site, cann = Path(torch_npu.__file__).parent, Path(os.environ["LD_LIBRARY_PATH"].partition(":")[0])
    return toolkit.make(tmp_path_factory.mktemp("toolkit") / "cann", site, cann)


@pytest.fixture
def environment(made, tmp_path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return own | made | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}


def test_every_kernel_is_compiled_and_launched(environment, tmp_path):
    """With the launcher's C++; a tile that does not fit is reduced."""
    out = tmp_path / "told.json"
    done = subprocess.run([sys.executable, SCRIPT, out], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    conv, norm = [[f"{op}::forward", f"{op}::backward"] for op in ("causal_conv1d", "rms_norm_gated")]
    walk = ["states", "grad_states", "gradients", "finish"]
    forward = [conv[0], *(f"delta_rule::{x}" for x in ("prepare", "invert", "scan")), norm[0]]
    backward = [norm[1], *(f"delta_rule::{x}" for x in walk), conv[1]]
    assert told["kernels"] == [*forward, *backward]
    assert told["begun"] == [*forward, norm[1], *forward, *backward]  # the queue has not been drained
    [line] = [line for line in told["told"] if "does not fit" in line]
    assert line.startswith("rms_norm_gated::backward: elements 8192 does not fit (ub overflow, requires ")
    assert line.endswith(" bits while 1572864 bits available); elements 4096")
    assert told["tiles"] == {"chunk": 64, "columns": 128, "channels": 2048, "elements": 4096}
    assert told["told"][0].startswith("compiling Triton kernels: 1 of 11, ")
    assert told["told"][-1].startswith("Triton kernels: 11 ready in ")
    assert told["launches"] == len(forward) + len(forward) + len(backward)
    assert told["stream"]


@pytest.mark.parametrize("how", ["locked", "unlocked"])
def test_several_processes_at_once(environment, tmp_path, how):
    """Without the lock, the second process includes half a header."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment |= {"CC": str(compiler), "GO_ON": str(tmp_path / "go on")}

    def start(kernel: int) -> subprocess.Popen:
        command = [sys.executable, "-W", "ignore", "-c", LAUNCHER, how, str(kernel)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)

    first = start(0)
    assert "is writing\n" in iter(first.stdout.readline, "")
    others = [start(kernel) for kernel in ((1, 2) if how == "locked" else (1,))]
    if how == "locked":
        assert all("waits\n" in iter(process.stdout.readline, "") for process in others)
        (tmp_path / "go on").touch()
    errors = [process.communicate(timeout=600)[1] for process in others]
    (tmp_path / "go on").touch()
    assert first.communicate(timeout=600) is not None and first.returncode == 0
    if how == "locked":
        assert [process.returncode for process in others] == [0, 0], errors
    else:
        assert others[0].returncode and "included: half\n" in errors[0]
