"""Compiles each Triton kernel, as launched, with triton-ascend and BiShengIR up to CANN's own step.

`python tests/npu/triton_compile.py FILE` compiles for all published models and a few more shapes,
and one of them for each target, and writes the results as JSON. BISHENGIR is the compiler's path.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from triton._C.libtriton import ir
from triton.backends.ascend import compiler as ascend
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource
from triton.runtime.jit import JITFunction

import kernels
from kernels.triton import rms_norm_gated
from kernels.triton.first_run import Layer, run_once, with_tiles
from kernels.triton.tiles import Tiles

TARGETS = ("Ascend910B2", "Ascend910B4", "Ascend910_9392")  # two of A2, and A3
PUBLISHED = {"0.8B, 2B": 16, "4B, 9B, 35B": 32, "27B": 48, "122B, 397B": 64}  # V heads; 16 K heads, all of 128
DONE = "External hivmc run fails, returning module before running external compiler"
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
SIZES = {"f32": 4, "i32": 4, "bf16": 2, "i16": 2, "i8": 1, "i1": 1 / 8, "i64": 8, "f16": 2}
OPTIONS = "auto-multi-buffer auto-bind-sub-block hfusion-compile hivm-compile triton-kernel-compile".split()


def launches(run) -> list[tuple[JITFunction, dict, dict]]:
    """What `run` would launch: kernel, argument types, constants. Nothing is launched."""
    found, launch = [], JITFunction.run

    def record(self, *args, grid, warmup, **constants):
        types = [
            TYPES[x.dtype] if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32" for x in args
        ]
        found.append((self, dict(zip(self.arg_names, types, strict=False)), constants))

    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = launch
    return found


def delta_net(Hk: int, Hv: int, D: int, tiles: Tiles | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
    """One layer's operators, forward and backward, on a few tokens."""
    chosen = kernels.Kernels(**{op: getattr(kernels.triton, op) for op in kernels.TRITON_OPS})
    run_once(with_tiles(chosen, tiles or Tiles.of(D, D)), Layer(Hk, Hv, D, D, dtype), torch.device("cpu"))


def too_large() -> list[tuple[JITFunction, dict, dict]]:
    """Tiles of more rows than the unified buffer holds, to show that the check can fail."""
    x = torch.randn(256, 128, dtype=torch.bfloat16, requires_grad=True)
    *_, (kernel, signature, constants) = launches(lambda: rms_norm_gated(x, x, torch.ones(128), 1e-6).sum().backward())
    return [(kernel, signature, constants | {"ROWS": 64})]


def to_linalg(kernel: JITFunction, signature: dict, constants: dict) -> tuple[str, str]:
    """-> the kernel as passed to BiShengIR; mix (cube and vector cores) or aiv (vector only)"""
    gpu = GPUTarget("npu", TARGETS[0], 0)  # up to here the target does not matter
    backend, context = ascend.AscendBackend(gpu), ir.context()
    options = backend.parse_options({})
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature, constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), {}, context)
    metadata = options.__dict__ | {"target": gpu}
    linalg = ascend.ttir_to_linalg(ascend.make_ttir(module, metadata, options), metadata, options, named_ops=True)
    linalg, metadata = ascend._parse_linalg_metadata(linalg, metadata)
    return linalg, metadata["mix_mode"]


def bishengir(linalg: str, target: str) -> dict:
    """-> whether it reached CANN's step, remarks, bytes per buffer, use of both vector cores"""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.mlir"
        source.write_text(linalg)
        flags = [f"--enable-{name}=true" for name in OPTIONS]
        command = [os.environ["BISHENGIR"], source, f"--target={target}", *flags, "-o", f"{folder}/kernel"]
        command += ["--mlir-print-ir-after=hivm-plan-memory", "--mlir-disable-threading"]  # two compile at once
        text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    notes = [line for line in text.splitlines() if re.search(r"\[NOTE\]|warning:|overflow", line)]
    buffers: dict[str, float] = {}
    for body in re.split("// -----// IR Dump After PlanMemory.*", text)[1:]:
        offsets = {name: int(value) for name, value in re.findall(r"(%\w+) = arith.constant (\d+) : i64", body)}
        for places, shape, kind, space in re.findall(
            r"pointer_cast\(([^)]*)\) : memref<([\dx]*)x(\w+), #hivm.address_space<(\w+)>>", body
        ):
            size = torch.Size(map(int, shape.split("x"))).numel() * SIZES[kind]
            ends = [offsets[place.strip()] + size for place in places.split(",")]
            buffers[space] = max(buffers.get(space, 0), *ends)
    room = re.search(r"_infer_workspace_shape_function\(\) -> index.*?arith.constant (\d+) : index", text, re.DOTALL)
    buffers["workspace"] = (
        int(room[1]) if room else 0
    )  # workspace in device memory, by which cube and vector cores exchange tiles
    return {"done": DONE in text, "notes": notes, "buffers": buffers, "halves": "get_sub_block_idx" in text}


def compile_all(cases: list[tuple[str, tuple[JITFunction, dict, dict]]], targets: tuple[str, ...]) -> list[dict]:
    """Compile each (shape, launch) for each target, two at a time."""
    sources = [to_linalg(*launch) for _, launch in cases]
    with ThreadPoolExecutor(2) as pool:
        jobs = [[pool.submit(bishengir, linalg, target) for target in targets] for linalg, _ in sources]
    return [
        {"shape": shape, "kernel": name(kernel), "mode": mode, "constants": constants, "target": target} | job.result()
        for (shape, (kernel, _, constants)), (_, mode), some in zip(cases, sources, jobs, strict=True)
        for target, job in zip(targets, some, strict=True)
    ]


def name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def published() -> list[tuple[str, tuple[JITFunction, dict, dict]]]:
    """The distinct launches of all models' layers; the gated norm's are the same in all."""
    every = [
        (shape, launch)
        for shape, heads in PUBLISHED.items()
        for launch in launches(lambda h=heads: delta_net(16, h, 128))
    ]
    return list({str(launch): (shape, launch) for shape, launch in reversed(every)}.values())


def main() -> None:
    cases = published()
    found = compile_all(cases, TARGETS[:1])
    found += compile_all([case for case in cases if case[0] == next(iter(PUBLISHED))], TARGETS[1:])
    others = {f"heads of {size}": launches(lambda size=size: delta_net(2, 4, size)) for size in (64, 256)}
    others["too large"] = too_large()
    for tiles in (Tiles(32, 64, 1024, 2048), Tiles(16, 16, 128, 256)):
        others[f"chunk {tiles.chunk}"] = launches(lambda tiles=tiles: delta_net(16, 32, 128, tiles))
    others["fp32"] = launches(lambda: delta_net(16, 32, 128, dtype=torch.float32))
    cases = [(shape, launch) for shape, some in others.items() for launch in some]
    Path(sys.argv[1]).write_text(json.dumps(found + compile_all(cases, TARGETS[:1])))


if __name__ == "__main__":
    main()
