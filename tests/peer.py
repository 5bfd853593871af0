"""transformers' own Qwen3.5 as the oracle: small configs, same weights, same packed input."""

import dataclasses
import inspect

import torch

from qwen35.batch import PackedBatch, derive
from qwen35.checkpoint.hf_names import text_only_name
from qwen35.model import Qwen35, load_config

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END = 160, 150, 151, 152, 153
PATCH_VALUES = 3 * 2 * 16 * 16
# for what treats all layers of a kind alike, in half of the time
ONE_OF_EACH = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


def forward_aux(model: Qwen35, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """-> hidden [T, H], the routers' load-balancing loss (scalar fp32, 0 for a dense model)"""
    hidden, stats = model.model(derive(batch, model.config.vision_spec))
    return hidden, model._aux(stats, hidden)


def config_dict(moe: bool = True, tied: bool = False, key_heads: int = 2, value_heads: int = 4, **text) -> dict:
    """config.json of a small Qwen3.5: 3 delta-net layers and 1 attention layer, 2 vision blocks."""
    kind = "qwen3_5_moe" if moe else "qwen3_5"
    ffn = (
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
        if moe
        else {"intermediate_size": 72}
    )
    return {
        "model_type": kind,
        "architectures": ["Qwen3_5MoeForConditionalGeneration" if moe else "Qwen3_5ForConditionalGeneration"],
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": f"{kind}_text",
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 24,
            "linear_conv_kernel_dim": 4,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            **ffn,
            **text,
        },
        "vision_config": {
            "model_type": kind,
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 36,
            "out_hidden_size": 48,
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


def text_only(config: dict) -> dict:
    """The flat config.json of its language model alone."""
    architecture = config["architectures"][0].replace("ConditionalGeneration", "CausalLM")
    return config["text_config"] | {"architectures": [architecture]}


def random_model(config: dict) -> Qwen35:
    """Random weights, none of which is zero or one."""
    model = Qwen35(load_config(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # small enough that the net does not amplify: else both sides measure their own rounding
            scale = 0.5 if "A_log" in name else 0.06 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if name.endswith("linear_attn.norm.weight"):
                p.add_(1)
    return model


def pair(config: dict, dtype: torch.dtype = torch.float32) -> tuple[Qwen35, torch.nn.Module]:
    """Our model and transformers', with the same random weights."""
    from transformers.models import qwen3_5, qwen3_5_moe  # slow to import, and not every user of this file needs it

    moe, is_text_only = "moe" in config["model_type"], config["model_type"].endswith("_text")
    module = qwen3_5_moe if moe else qwen3_5
    Config = getattr(module, f"Qwen3_5{'Moe' * moe}{'Text' * is_text_only}Config")
    Model = getattr(module, config["architectures"][0])
    ours, theirs = random_model(config), Model(Config(**config)).float()
    state = {text_only_name(name) if is_text_only else name: value for name, value in ours.state_dict().items()}
    missing, surplus = theirs.load_state_dict(state, strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}, (missing, surplus)
    return ours.to(dtype), theirs.to(dtype)


def sample(parts: list, seed: int = 0) -> PackedBatch:
    """One sequence. parts: n text tokens, an image of (h, w) patches, or a video of (t, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    ids, positions, pixels, grids, at = [], [], [], [], 0
    for part in parts:
        if isinstance(part, int):
            ids.append(torch.randint(0, 140, (part,), generator=generator))
            positions.append((torch.arange(part) + at).expand(3, -1))
            at += part
            continue
        frames, (h, w) = (1, part) if len(part) == 2 else (part[0], part[1:])
        grids.append([frames, h, w])
        pixels.append(torch.randn(frames * h * w, PATCH_VALUES, generator=generator))
        for _ in range(frames):
            tokens = h * w // 4
            row, col = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
            here = torch.stack([torch.zeros(tokens, dtype=torch.long), row.flatten(), col.flatten()]) + at + 1
            marks = [VISION_START, *[IMAGE if len(part) == 2 else VIDEO] * tokens, VISION_END]
            ids.append(torch.tensor(marks))
            end = at + 1 + max(h, w) // 2
            positions.append(torch.cat([torch.full((3, 1), at), here, torch.full((3, 1), end)], dim=1))
            at = end + 1
    ids, positions = torch.cat(ids), torch.cat(positions, dim=1)
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        pixel_values=torch.cat(pixels) if pixels else torch.zeros(0, PATCH_VALUES),
        grid_thw=torch.tensor(grids) if grids else torch.zeros(0, 3, dtype=torch.long),
    )


def pack(samples: list[PackedBatch]) -> PackedBatch:
    lengths = [len(s.input_ids) for s in samples]
    cat = {f: torch.cat([getattr(s, f) for s in samples]) for f in ("input_ids", "labels", "pixel_values", "grid_thw")}
    return PackedBatch(
        **cat,
        position_ids=torch.cat([s.position_ids for s in samples], dim=1),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    )


def peer_inputs(s: PackedBatch) -> dict:
    """The same single sequence for transformers, which works out positions and places itself."""
    ids = s.input_ids[None]
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    inputs = {"input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}
    is_video = bool((ids == VIDEO).any())
    if len(s.grid_thw):
        name = "video" if is_video else "image"
        inputs |= {
            "pixel_values_videos" if is_video else "pixel_values": s.pixel_values,
            f"{name}_grid_thw": s.grid_thw,
        }
    return inputs


def continued(theirs: torch.nn.Module, inputs: dict, count: int, **options) -> list[int]:
    """transformers' greedy answer of up to `count` tokens; 5.2 takes no kinds of tokens."""
    known = inspect.signature(theirs.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in known}
    out = theirs.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def to_dtype(batch: PackedBatch, dtype: torch.dtype) -> PackedBatch:
    return dataclasses.replace(batch, pixel_values=batch.pixel_values.to(dtype))
