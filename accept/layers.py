"""A layer of each kind on the device beside the same on the CPU in fp32: what it returns, and the gradients of all it holds."""

import torch
from torch import Tensor, nn

import kernels
from accept.task import Task, distance
from qwen35.batch import VisionSpec, build_patch_layout
from qwen35.device import HOST, set_up_device
from qwen35.model import ModelConfig, Qwen35, load_config
from qwen35.model.rope import text_rope, vision_rope
from qwen35.parallel.fsdp import REPLICATED
from rehearse.configs import some_layers

WHY = "the roundings of some ten ops; small gradients are differences of large ones"
TOLERANCES = {torch.float32: (5e-4, f"fp32: {WHY}"), torch.bfloat16: (6e-2, f"bf16: {WHY}")}
LENGTHS = (1, 64, 150, 9)
NARROW = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
NARROW |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
NARROW_EXPERTS = NARROW | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
NARROW_TOWER = {"hidden_size": 128, "intermediate_size": 192, "num_heads": 2, "num_position_embeddings": 16}


def check(task: Task) -> None:
    device = set_up_device()
    text, with_experts, tower = (NARROW, NARROW_EXPERTS, NARROW_TOWER) if task.small else ({}, {}, {})
    few = {"vocab_size": 512, "num_experts": 32}
    dense = some_layers("4B", ["linear_attention", "full_attention"], text | {"vocab_size": 512}, tower)
    experts = some_layers("35B-A3B", ["full_attention"], with_experts | few, tower)
    first, second, block = "model.language_model.layers.0", "model.language_model.layers.1", "model.visual.blocks.0"
    parts = {"delta-net layer": first, "attention layer": second, "vision block": block}
    for config, some in ((dense, parts), (experts, {"MoE of a layer": f"{first}.mlp"})):
        host = Qwen35.from_config(config)
        with torch.device("meta"):
            here = Qwen35(load_config(config), kernels=kernels.select(device.type))
        for what, path in some.items():
            part = here.get_submodule(path).to_empty(device=device)
            for dtype, tolerance in TOLERANCES.items():
                task.compare(f"{what}, {dtype}", compare(host, path, part, device, dtype), *tolerance)


def compare(host: Qwen35, path: str, here: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Both hold the same numbers, those that `dtype` has. The router and its like stay fp32, as in a run."""
    part = host.get_submodule(path)
    for (name, p), mine in zip(part.named_parameters(prefix=path), here.parameters(), strict=True):
        of = torch.float32 if name.endswith(REPLICATED) else dtype
        p.data = p.data.to(of).float()
        mine.data = p.data.to(device, of)
    out, *gradients = run(here, host.config, path, device, dtype)
    exact, *wanted = run(part, host.config, path, HOST)
    return {"forward": distance([out], [exact]), "gradients": distance(gradients, wanted)}


def run(
    part: nn.Module, c: ModelConfig, path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """-> the output, the gradients of the input and of every parameter"""
    index = build_patch_layout(torch.tensor([[1, 8, 12], [1, 4, 4]]), VisionSpec(0, 0))
    is_vision = "visual" in path
    cu_seqlens = index.cu_seqlens if is_vision else torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    T, H = int(cu_seqlens[-1]), (c.vision if is_vision else c.text).hidden_size
    numbers = torch.randn(2, T, H, generator=torch.Generator().manual_seed(0)).bfloat16()
    x, direction = numbers.to(device, dtype)
    x, counted = x.clone().requires_grad_(), torch.ones(T, device=device)
    if is_vision:
        out = part(x, vision_rope(index.position.to(device), H // c.vision.num_heads), cu_seqlens)
    elif path.endswith("mlp"):
        out, _ = part(x, counted)
    else:
        position = torch.cat([torch.arange(n) for n in LENGTHS]).expand(3, -1).to(device)
        rope = text_rope(position, c.text.rotary_dim, c.text.rope_theta, c.text.mrope_section)
        out, _ = part(x, rope, cu_seqlens, counted)
    return [out, *torch.autograd.grad(out, [x, *part.parameters()], direction)]
