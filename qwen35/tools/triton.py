"""What triton-ascend needs to compile a kernel and its C++ launcher at the first launch.

The checks follow triton/backends/ascend/utils.py of 3.2.0: _get_cxx, _precompile_npu_ext,
_get_npucompiler_path, and _get_bisheng_path, without which its driver counts as inactive.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen35.tools.doctor.host import Finding, Machine, ok, wrong
from qwen35.triton_cache import cache_folder, unfit


def triton(m: Machine) -> Iterator[Finding]:
    """Nothing where triton-ascend is not installed."""
    if not m.package("triton-ascend"):
        return
    cc, cann, python = m.get("CC"), "CANN's set_env.sh adds it: install the whole of CANN's toolkit", m.python_version
    missing = f"CC={cc} is not a program" if cc else "neither clang++ nor g++ is on PATH"
    compiler = [cc] if cc else ["clang++", "g++"]
    for subject, names, fact, todo in (
        (
            "C++ compiler",
            compiler,
            f"{missing}, but triton-ascend compiles C++ launchers",
            "install g++, or set CC to one",
        ),
        ("bishengir-compile", ["bishengir-compile"], "is not on PATH", cann),
        ("bisheng", ["bisheng"], "is not on PATH", cann),
    ):
        found = next((path for name in names if (path := shutil.which(name, path=m.get("PATH")))), None)
        yield ok(subject, found) if found else wrong(subject, fact, todo)
    if not (Path(m.include) / "Python.h").is_file():
        package = f"python{python[0]}.{python[1]}-dev"
        yield wrong("Python.h", f"is not in {m.include}", f"install {package} (python3-devel), or set PYTHON")
    if not m.package("pybind11"):
        yield wrong("pybind11", "is not installed", "make install DEVICE=npu")
    if why := unfit(folder := cache_folder(m.environment)):
        todo = "set TRITON_CACHE_DIR to a folder of your own, since its files are loaded and run"
        yield wrong("Triton's cache", f"{folder}: {why}", todo)
