"""A stand-in for CANN's toolkit with which triton-ascend compiles and launches, computing nothing.

BiShengIR is real up to CANN's last step, hivmc, which here only writes a file. triton-ascend's C++
is compiled by g++ against torch_npu's headers and the runtime declared here, and linked to a
runtime that counts launches.
"""

import os
import subprocess
from pathlib import Path

# what npu_utils.cpp and the launchers use, as declared in CANN's reference; profiler types are
# torch_npu's
RT_H = """
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <unistd.h>
#include "profiling/aprof_pub.h"
#include "profiling/prof_common.h"
typedef int32_t rtError_t;
typedef void *rtStream_t;
enum { RT_ERROR_NONE = 0 };
enum { MSPROF_GE_TASK_TYPE_AIV = 2, MSPROF_GE_TASK_TYPE_MIX_AIC = 4, MSPROF_GE_TASK_TYPE_MIX_AIV = 5 };
enum { RT_MEMORY_HBM = 2, RT_MEMORY_HOST = 0x81 };
typedef enum { RT_MEMCPY_HOST_TO_DEVICE = 1, RT_MEMCPY_DEVICE_TO_HOST = 2 } rtMemcpyKind_t;
typedef enum { RT_LIMIT_TYPE_LOW_POWER_TIMEOUT, RT_LIMIT_TYPE_SIMT_WARP_STACK_SIZE, RT_LIMIT_TYPE_SIMT_DVG_WARP_STACK_SIZE,
               RT_LIMIT_TYPE_STACK_SIZE } rtLimitType_t;
enum : uint32_t { RT_DEV_BINARY_MAGIC_ELF = 0x43554245, RT_DEV_BINARY_MAGIC_ELF_AIVEC = 0x41415246 };
typedef struct { uint32_t magic; uint32_t version; const void *data; uint64_t length; } rtDevBinary_t;
extern "C" {
rtError_t rtSetDevice(int32_t);
rtError_t rtDevBinaryRegister(const rtDevBinary_t *, void **);
rtError_t rtFunctionRegister(void *, const void *, const char *, const void *, uint32_t);
rtError_t rtGetSocVersion(char *, uint32_t);
rtError_t rtGetAiCoreCount(uint32_t *);
rtError_t rtGetC2cCtrlAddr(uint64_t *, uint32_t *);
rtError_t rtKernelLaunch(const void *, uint32_t, void *, uint32_t, void *, rtStream_t);
rtError_t rtStreamCreate(rtStream_t *, int32_t);
rtError_t rtStreamDestroy(rtStream_t);
rtError_t rtStreamSynchronize(rtStream_t);
rtError_t rtMalloc(void **, uint64_t, uint32_t, uint16_t);
rtError_t rtFree(void *);
rtError_t rtMallocHost(void **, uint64_t, uint32_t);
rtError_t rtFreeHost(void *);
rtError_t rtMemcpy(void *, uint64_t, const void *, uint64_t, rtMemcpyKind_t);
rtError_t rtDeviceSetLimit(int32_t, rtLimitType_t, uint32_t);
}
"""
RUNTIME = """
#include "runtime/runtime/rt.h"
#include <cstdlib>
static int something;
extern "C" {
int launches = 0;
rtError_t rtSetDevice(int32_t) { return 0; }
rtError_t rtDevBinaryRegister(const rtDevBinary_t *, void **handle) { *handle = &something; return 0; }
rtError_t rtFunctionRegister(void *, const void *, const char *, const void *, uint32_t) { return 0; }
rtError_t rtGetSocVersion(char *name, uint32_t size) { snprintf(name, size, "Ascend910B2"); return 0; }
rtError_t rtGetAiCoreCount(uint32_t *count) { *count = 24; return 0; }
rtError_t rtGetC2cCtrlAddr(uint64_t *address, uint32_t *length) { *address = *length = 0; return 0; }
rtError_t rtKernelLaunch(const void *, uint32_t, void *, uint32_t, void *, rtStream_t) { ++launches; return 0; }
rtError_t rtStreamCreate(rtStream_t *stream, int32_t) { *stream = &something; return 0; }
rtError_t rtStreamDestroy(rtStream_t) { return 0; }
rtError_t rtStreamSynchronize(rtStream_t) { return 0; }
rtError_t rtMalloc(void **at, uint64_t size, uint32_t, uint16_t) { *at = malloc(size); return 0; }
rtError_t rtFree(void *at) { free(at); return 0; }
rtError_t rtMallocHost(void **at, uint64_t size, uint32_t) { *at = malloc(size); return 0; }
rtError_t rtFreeHost(void *at) { free(at); return 0; }
rtError_t rtMemcpy(void *to, uint64_t, const void *from, uint64_t n, rtMemcpyKind_t) { memcpy(to, from, n); return 0; }
rtError_t rtDeviceSetLimit(int32_t, rtLimitType_t, uint32_t) { return 0; }
uint64_t MsprofSysCycleTime() { return 0; }
uint64_t MsprofGetHashId(const char *, size_t) { return 0; }
int32_t MsprofRegisterCallback(uint32_t, ProfCommandHandle) { return 0; }
int32_t MsprofReportApi(uint32_t, const MsprofApi *) { return 0; }
int32_t MsprofReportCompactInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
int32_t MsprofReportAdditionalInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
}
"""
PROGRAMS = {
    "bisheng": 'echo "hiipu64"',
    "bishengir-compile": 'exec "$BISHENGIR" "$@"',
    "hivmc": """
[[ $1 != --version ]] || { echo "hivmc 1.2.0 (0123456 2026-01-01)"; exit; }
while [[ $1 != -o ]]; do shift; done
echo "stand-in" >"$2.o"
""",
}


def make(folder: Path, torch_npu: Path, cann: Path) -> dict[str, str]:
    """-> environment variables. torch_npu: the package's folder; cann: stand_ins.py's folder."""
    (folder / "include/runtime/runtime").mkdir(parents=True)
    (folder / "include/runtime/runtime/rt.h").write_text(RT_H)
    (folder / "lib64").mkdir()
    (folder / "runtime.cpp").write_text(RUNTIME)
    library = folder / "lib64/libruntime.so"
    include = [f"-I{folder / 'include'}", f"-I{torch_npu / 'include'}"]
    subprocess.run(
        ["g++", "-std=c++17", "-shared", "-fPIC", "-w", *include, "-o", library, folder / "runtime.cpp"], check=True
    )
    (folder / "lib64/libascendcl.so").symlink_to(cann / "libascendcl.so")
    (folder / "bin").mkdir()
    for name, script in PROGRAMS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    return {
        "ASCEND_HOME_PATH": str(folder),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{folder / 'lib64'}:{torch_npu / 'lib'}:{cann}",
    }
