"""The vision tower: all images' and video frames' patches at once, attention inside each frame."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import Kernels
from qwen35.batch import PatchLayout
from qwen35.model.attention import AttentionCore
from qwen35.model.config import VisionConfig
from qwen35.model.rope import Rope, vision_rope


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig, kernels: Kernels):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.core, self.rotary = AttentionCore(kernels, causal=False), kernels.apply_rotary

    def forward(self, x: Tensor, rope: Rope, cu_seqlens: Tensor) -> Tensor:
        """x [P, Hv] -> [P, Hv]"""
        q, k, v = rearrange(self.qkv(x), "p (qkv h d) -> p qkv h d", qkv=3, h=self.heads).unbind(1)
        return self.proj(rearrange(self.core(q, k, v, cu_seqlens, self.rotary, *rope), "p h d -> p (h d)"))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, kernels: Kernels):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config, kernels)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, rope: Rope, cu_seqlens: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, cu_seqlens)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A linear map of patches [P, C*2*16*16] -> [P, Hv]; its weight has the checkpoint's layout."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, size, stride=size)

    def forward(self, pixels: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(pixels.to(weight.dtype), weight, self.proj.bias)


class Merger(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patches = config.spatial_merge_size**2  # per token
        merged = config.hidden_size * self.patches
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(merged, merged)
        self.linear_fc2 = nn.Linear(merged, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [P, Hv], the patches of each 2x2 block adjacent -> [P/4, H]"""
        blocks = rearrange(self.norm(x), "(token patch) c -> token (patch c)", patch=self.patches)
        return self.linear_fc2(F.gelu(self.linear_fc1(blocks)))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig, kernels: Kernels):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config, kernels) for _ in range(config.depth))
        self.merger = Merger(config)
        self.gather_features = nn.Identity()  # context parallelism replaces it
        self.recompute = False  # save only each block's input for backward

    def forward(self, pixels: Tensor, index: PatchLayout) -> Tensor:
        """pixels [P, C*2*16*16] -> features [P/4, H]"""
        # an einsum would be a batched matmul with one row per patch
        learned = (self.pos_embed(index.corner).float() * index.corner_weight[..., None]).sum(0)
        x = self.patch_embed(pixels)
        x = x + learned.to(x.dtype)
        rope = vision_rope(index.position, self.head_dim)
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, rope, index.cu_seqlens, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, index.cu_seqlens)
        return self.gather_features(self.merger(x))
