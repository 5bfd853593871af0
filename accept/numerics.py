"""Ops and layers on the device beside the same on the CPU: outputs, and gradients of all inputs."""

import torch
from torch import nn

import kernels
from accept.cases import SMALL, make_cases, outputs_of, prepare
from accept.task import Outputs, Task, errors_of
from kernels import reference
from qwen35.batch import VisionSpec, build_patch_layout
from qwen35.device import HOST, set_up_device
from qwen35.model import ModelConfig, Qwen35, load_config
from qwen35.model.rope import text_rope, vision_rope
from qwen35.parallel.fsdp import REPLICATED
from rehearse.configs import some_layers

# On a CPU the ops are within 2e-5 and 2e-2; in fp32 the rest is for a device's own exp and rsqrt.
OP_TOLERANCES = {
    torch.float32: (1e-4, "fp32: sums in another order, the device's own exp and rsqrt"),
    torch.bfloat16: (2e-2, "bf16: a few roundings of 2^-9 in a row"),
}
WHY = "the roundings of some ten ops; small gradients are differences of large ones"
LAYER_TOLERANCES = {torch.float32: (5e-4, f"fp32: {WHY}"), torch.bfloat16: (6e-2, f"bf16: {WHY}")}
LENGTHS = (1, 64, 150, 9)  # of the sequences
LAYER = "model.language_model.layers"


def check_operators(task: Task) -> None:
    """Every op against kernels/reference.py in fp64."""
    device = set_up_device()
    chosen = kernels.select(device.type)
    torch.manual_seed(0)
    for op, make in make_cases(*SMALL).items():
        case = make()
        for dtype, tolerance in OP_TOLERANCES.items():
            args, ours = prepare(case, dtype, device)
            exact_args, exact = prepare(case, dtype, HOST, torch.float64)
            outputs = outputs_of(getattr(chosen, op), args), outputs_of(getattr(reference, op), exact_args)
            task.compare(f"{op}, {dtype}", errors_of((outputs[0], ours), (outputs[1], exact)), *tolerance)


def check_layers(task: Task) -> None:
    """A layer of each kind against the CPU's in fp32."""
    device = set_up_device()
    sizes = {"num_experts": 16, "moe_intermediate_size": 128} if task.small else {"num_experts": 32}
    dense = some_layers(task.size, ["linear_attention", "full_attention"], {"vocab_size": 512})
    moe = some_layers("35B-A3B", ["full_attention"], {"vocab_size": 512, **sizes})
    parts = {"delta-net layer": f"{LAYER}.0", "attention layer": f"{LAYER}.1", "vision block": "model.visual.blocks.0"}
    for config, paths in ((dense, parts), (moe, {"MoE of a layer": f"{LAYER}.0.mlp"})):
        host = Qwen35.from_config(config)
        with torch.device("meta"):
            model = Qwen35(load_config(config), kernels=kernels.select(device.type))
        for what, path in paths.items():
            ours, exact = model.get_submodule(path).to_empty(device=device), host.get_submodule(path)
            for dtype, tolerance in LAYER_TOLERANCES.items():
                # both have the same weights, rounded to dtype; the router and the like stay fp32
                for (name, p), own in zip(exact.named_parameters(prefix=path), ours.parameters(), strict=True):
                    narrow = torch.float32 if name.endswith(REPLICATED) else dtype
                    p.data = p.data.to(narrow).float()
                    own.data = p.data.to(device, narrow)
                places = (ours, device, dtype), (exact, HOST, torch.float32)
                outputs = [run_layer(path, host.config, *place) for place in places]
                task.compare(f"{what}, {dtype}", errors_of(*outputs), *tolerance)


def run_layer(path: str, c: ModelConfig, part: nn.Module, device: torch.device, dtype: torch.dtype) -> Outputs:
    """Of a layer, a MoE or a vision block; the leaves are the input and all parameters."""
    index = build_patch_layout(torch.tensor([[1, 8, 12], [1, 4, 4]]), VisionSpec(0, 0))
    tower = c.vision if "visual" in path else None
    cu_seqlens = index.cu_seqlens if tower else torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    T, H = int(cu_seqlens[-1]), (tower or c.text).hidden_size
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(0)).bfloat16().to(device, dtype).requires_grad_()
    counted = torch.ones(T, device=device)  # every token counts in the router's statistics
    if tower:
        out = part(x, vision_rope(index.position.to(device), H // tower.num_heads), cu_seqlens)
    elif path.endswith("mlp"):
        out, _ = part(x, counted)
    else:
        position = torch.cat([torch.arange(n) for n in LENGTHS]).expand(3, -1).to(device)
        rope = text_rope(position, c.text.rotary_dim, c.text.rope_theta, c.text.mrope_section)
        out, _ = part(x, rope, cu_seqlens, counted)
    return [out], [x, *part.parameters()]
