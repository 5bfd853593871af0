"""Slice S, which most rows of the benchmark time, beside its peer; and how they time.

Hidden 1024, 4 layers (3 gated delta net, 1 attention), 64 experts top-8 of 512 and a
shared one, a vocabulary of 248,320, bf16, forward + backward. The peer is transformers' own model
with the same weights, grouped experts and fused attention.
"""

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qwen35.batch import IGNORE, PackedBatch
from qwen35.model import Qwen35
from qwen35.training.loss import token_weights

BF16 = torch.bfloat16
VOCABULARY = 248_320
Result = dict[str, Any]

TEXT = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
VISION = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 1,
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 1024,
}


def config(vocabulary: int) -> dict[str, Any]:
    """config.json of slice S, with a minimal vision tower."""
    return {
        "model_type": "qwen3_5_moe",
        "image_token_id": 1,
        "video_token_id": 2,
        "tie_word_embeddings": False,
        "text_config": TEXT | {"model_type": "qwen3_5_moe_text", "vocab_size": vocabulary},
        "vision_config": VISION | {"model_type": "qwen3_5_moe"},
    }


def models(vocabulary: int, with_peer: bool) -> tuple[Qwen35, nn.Module | None]:
    torch.set_default_dtype(BF16)  # weights in fp32, before they are rounded, would count in the peak
    ours = Qwen35.from_config(config(vocabulary)).to(BF16)
    torch.set_default_dtype(torch.float32)
    if not with_peer:
        return ours, None
    from transformers.models.qwen3_5_moe import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    implementation = {"experts_implementation": "grouped_mm", "attn_implementation": "sdpa", "dtype": BF16}
    theirs = Qwen3_5MoeForConditionalGeneration._from_config(Qwen3_5MoeConfig(**config(vocabulary)), **implementation)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


# -- measuring -------------------------------------------------------------------------------------


def alternate(calls: list[Callable[[], Any]], rounds: int = 5, seconds: float = 90) -> list[float]:
    """The median seconds of each call, after a first round; fewer rounds if they take long."""
    times: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for i in range(rounds + 1):
        for call, its in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            its.append(time.perf_counter() - start)
        if i and (time.perf_counter() - begin) * (1 + 1 / (i + 1)) > seconds:
            break
    return [float(torch.tensor(its[1:]).median()) for its in times]


def matmul_rate() -> float:
    """FLOP/s of one large bf16 matmul."""
    a = torch.randn(4096, 4096).to(BF16)
    return 2 * 4096**3 / alternate([lambda: a @ a])[0]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def packed(lengths: tuple[int, ...], trained: float) -> PackedBatch:
    """Text alone. The last part of each sequence, a share `trained`, has labels."""
    total = sum(lengths)
    ids = torch.randint(10, VOCABULARY, (total,), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORE)
    start = 0
    for length in lengths:
        first = start + int(length * (1 - trained))
        labels[first : start + length - 1] = ids[first + 1 : start + length]
        start += length
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths]).expand(3, -1),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        pixel_values=torch.zeros(0, 3 * 2 * 16 * 16),
        grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        label_positions=(labels != IGNORE).nonzero().squeeze(1),
    )


def step(model: Qwen35, batch: PackedBatch) -> float:
    loss, _, _ = model.loss(batch, token_weights(batch, "default"))
    loss.backward()
    model.zero_grad()
    return float(loss.detach())


def peer_step(model: nn.Module, batch: PackedBatch) -> float:
    """The same sequences, padded to the longest."""
    bounds = list(zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True))
    longest = max(end - start for start, end in bounds)
    ids = torch.zeros(len(bounds), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, (start, end) in enumerate(bounds):
        ids[row, : end - start], mask[row, : end - start] = batch.input_ids[start:end], 1
        labels[row, 1 : end - start] = batch.labels[start : end - 1]  # it shifts them itself
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    model.zero_grad()
    return float(loss.detach())
