"""Rung 5, launching: the first run of all kernels, and several processes that share a cache."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toolkit
import torch_npu
from triton.backends.ascend.driver import generate_npu_header_src, make_npu_launcher_stub

from qwen35.triton_cache import cache_folder, compiling

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


class Launcher:
    """A fork of this process, which has done the imports, in an environment of its own."""

    def __init__(self, environment: dict[str, str], how: str, kernel: int):
        source, target = os.pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=launch, args=(target, environment, how, kernel)
        )
        self.process.start()
        os.close(target)
        self.output = os.fdopen(source)

    def end(self) -> tuple[int | None, str]:
        """-> its exit status, and what it had still to say"""
        said = self.output.read()
        self.output.close()
        self.process.join(600)
        return self.process.exitcode, said


def launch(output: int, environment: dict[str, str], how: str, kernel: int) -> None:
    """What triton-ascend does at a kernel's first launch, before it loads the compiled launcher."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    held = compiling(cache_folder(), lambda who: print("waits", flush=True))
    with held if how == "locked" else contextlib.nullcontext():
        make_npu_launcher_stub(generate_npu_header_src(), f"a kernel {kernel}")


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

    go_on = Path(environment["GO_ON"])
    first = Launcher(environment, how, 0)
    try:
        assert "is writing\n" in iter(first.output.readline, "")
        others = [Launcher(environment, how, kernel) for kernel in ((1, 2) if how == "locked" else (1,))]
        if how == "locked":
            assert all("waits\n" in iter(other.output.readline, "") for other in others)
            go_on.touch()
        ends = [other.end() for other in others]
    finally:  # or the first would wait for ever, and pytest for it
        go_on.touch()
    assert first.end()[0] == 0
    if how == "locked":
        assert [status for status, _ in ends] == [0, 0], ends
    else:
        assert ends[0][0] and "included: half\n" in ends[0][1]
