"""Stand-ins for the CANN libraries: with them the real torch_npu imports without CANN or an NPU.

`python rehearse/stand_ins.py SITE OUT`: for the torch_npu below SITE, one C file of functions that
return 0 is generated and compiled under each library's name into OUT. Only the functions that the
import calls return a result. Nothing runs on this device: fake tensors or CPU bodies take the place
of its operators.
"""

import re
import subprocess
import sys
from pathlib import Path

LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
NAME = re.compile(rb"\0((?:acl(?!nn)|Hccl|rt|Msprof)[A-Z]?[A-Za-z0-9_]*)(?=\0)")  # linked, or looked up by name

ANSWERS = {  # function -> arguments, body
    "aclrtGetDeviceCount": ("unsigned *count", "*count = 1;"),
    "aclrtGetDevice": ("int *device", "*device = 0;"),
    "aclrtGetCurrentContext": ("void **context", "*context = &something;"),
    "aclrtCreateContext": ("void **context, int device", "*context = &something;"),
    "aclrtCreateStream": ("void **stream", "*stream = &something;"),
    "aclrtCreateStreamWithConfig": ("void **stream, unsigned priority, unsigned flag", "*stream = &something;"),
    "aclrtCreateEvent": ("void **event", "*event = &something;"),
    "aclrtCreateEventWithFlag": ("void **event, unsigned flag", "*event = &something;"),
    "aclrtCreateEventExWithFlag": ("void **event, unsigned flag", "*event = &something;"),
    "aclrtMalloc": ("void **pointer, size_t size, int policy", "*pointer = malloc(size);"),
    "aclrtMallocHost": ("void **pointer, size_t size", "*pointer = malloc(size);"),
    "aclrtMemcpy": ("void *to, size_t room, const void *from, size_t count, int kind", "memcpy(to, from, count);"),
    "aclrtMemcpyAsync": (
        "void *to, size_t room, const void *from, size_t count, int kind, void *stream",
        "memcpy(to, from, count);",
    ),
    "aclrtGetMemInfo": ("int kind, size_t *free, size_t *total", "*free = *total = (size_t)64 << 30;"),
    "aclGetCompileoptSize": ("int option", "return 256;"),
}
# A torch built for CUDA registers some names of allocator settings that torch_npu registers too,
# which is allowed once. From torch 2.10 on they are in this std::unordered_set: it is emptied
# before torch_npu starts.
CLAIMED = """
extern struct { void **buckets; size_t count; void *first; size_t elements; } claimed
    __asm__("_ZZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11EvE4keys") __attribute__((weak));
static void __attribute__((constructor)) forget(void) {
    if (!&claimed) return;
    memset(claimed.buckets, 0, claimed.count * sizeof(void *));
    claimed.first = 0;
    claimed.elements = 0;
}
"""
TEXTS = {"aclrtGetSocName": "Ascend910B2", "aclGetRecentErrMsg": ""}


def names(site: Path) -> set[str]:
    """The CANN functions that torch_npu links or looks up: their names are in its libraries."""
    found = set()
    for library in [*site.glob("torch_npu/*.so"), *site.glob("torch_npu/lib/*.so")]:
        found |= {name.decode() for name in NAME.findall(library.read_bytes())}
    return found | set(ANSWERS) | set(TEXTS)


def source(site: Path) -> str:
    lines = ["#include <stdlib.h>", "#include <string.h>", "static int something;", CLAIMED]
    for name in sorted(names(site)):
        if name in TEXTS:
            lines.append(f'const char *{name}(void) {{ return "{TEXTS[name]}"; }}')
        else:
            arguments, body = ANSWERS.get(name, ("void", ""))
            lines.append(f"long {name}({arguments}) {{ {body} return 0; }}")
    return "\n".join(lines) + "\n"


def build(site: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    code = out / "cann.c"
    code.write_text(source(site))
    for library in LIBRARIES:
        target = f"lib{library}.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-w", "-O0", f"-Wl,-soname,{target}", "-o", out / target, code], check=True
        )


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
