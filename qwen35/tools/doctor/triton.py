"""What triton-ascend needs to compile a kernel and its C++ launcher at the first launch.

The checks follow triton/backends/ascend/utils.py of 3.2.0: _get_cxx, _precompile_npu_ext,
_get_npucompiler_path, and _get_bisheng_path, without which its driver counts as inactive.
"""

import shutil
from pathlib import Path

from qwen35.tools.doctor.machine import Finding, Machine, ok, wrong
from qwen35.triton_cache import cache_folder, unfit


def triton(m: Machine) -> list[Finding]:
    return [_compiler(m), _headers(m), _pybind11(m), _bishengir(m), _cache(m)] if m.package("triton-ascend") else []


def _compiler(m: Machine) -> Finding:
    names = [m.get("CC")] if m.get("CC") else ["clang++", "g++"]
    found = next((path for name in names if (path := shutil.which(name, path=m.get("PATH")))), None)
    if found:
        return ok("C++ compiler", found)
    fact = f"CC={names[0]} is not a program" if m.get("CC") else "neither clang++ nor g++ is on PATH"
    return wrong("C++ compiler", f"{fact}, but triton-ascend compiles C++ launchers", "install g++, or set CC to one")


def _headers(m: Machine) -> Finding:
    file = Path(m.include) / "Python.h"
    if file.is_file():
        return ok("Python.h", str(file))
    version = ".".join(map(str, m.python_version[:2]))
    return wrong("Python.h", f"is not in {m.include}", f"install python{version}-dev (python3-devel), or set PYTHON")


def _pybind11(m: Machine) -> Finding:
    found = m.package("pybind11")
    return ok("pybind11", found.version) if found else wrong("pybind11", "is not installed", "make install DEVICE=npu")


def _bishengir(m: Machine) -> Finding:
    found = {name: shutil.which(name, path=m.get("PATH")) for name in ("bishengir-compile", "bisheng")}
    for name, path in found.items():
        if not path:
            return wrong(name, "is not on PATH", "CANN's set_env.sh adds it: install the whole of CANN's toolkit")
    return ok("bishengir-compile", f"{found['bishengir-compile']}, and bisheng")


def _cache(m: Machine) -> Finding:
    folder = cache_folder(m.environment)
    if why := unfit(folder):
        todo = "set TRITON_CACHE_DIR to a folder of your own, since its files are loaded and run"
        return wrong("Triton's cache", f"{folder}: {why}", todo)
    return ok("Triton's cache", str(folder))
