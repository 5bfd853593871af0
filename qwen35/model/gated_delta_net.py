"""The gated delta net, in three of four layers. Source: Yang et al. 2024, arXiv:2412.06464."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels import Kernels
from kernels.recompute_cache import RecomputeCache
from qwen35.model.config import TextConfig
from qwen35.model.linear import recomputed_linears
from qwen35.model.norm import RMSNorm, RMSNormGated


class DeltaNetCore(nn.Module):
    """Convolution and delta rule, without parameters. Context parallelism replaces it."""

    def __init__(self, config: TextConfig, kernels: Kernels):
        super().__init__()
        self.k_dim, self.v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys = config.linear_num_key_heads * self.k_dim
        self.split = [keys, keys, config.linear_num_value_heads * self.v_dim]
        self.conv, self.delta_rule = kernels.causal_conv1d, kernels.chunk_gated_delta_rule

    def forward(
        self,
        qkv: Tensor,
        g: Tensor,
        beta: Tensor,
        conv_weight: Tensor,
        cu_seqlens: Tensor,
        recompute_cache: RecomputeCache | None = None,
    ) -> Tensor:
        """qkv [T, 2 Hk Dk + Hv Dv], g, beta [T, Hv] fp32, conv_weight [C, K] -> [T, Hv, Dv]"""
        return self.delta_rule(
            *self.heads(self.conv(qkv, conv_weight, cu_seqlens)), g, beta, cu_seqlens, recompute_cache
        )

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, 2 Hk Dk + Hv Dv] -> q, k [T, Hk, Dk], v [T, Hv, Dv]"""
        q, k, v = qkv.split(self.split, dim=-1)
        heads = (q, self.k_dim), (k, self.k_dim), (v, self.v_dim)
        return tuple(rearrange(x, "t (h d) -> t h d", d=dim) for x, dim in heads)


class Conv1d(nn.Module):
    """The depthwise convolution's weight in the checkpoint's layout, [C, 1, K]."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))


class GatedDeltaNet(nn.Module):
    def __init__(self, config: TextConfig, kernels: Kernels):
        super().__init__()
        hidden, heads = config.hidden_size, config.linear_num_value_heads
        value = heads * config.linear_value_head_dim
        channels = 2 * config.linear_num_key_heads * config.linear_key_head_dim + value
        self.in_proj_qkv = nn.Linear(hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(hidden, value, bias=False)
        self.in_proj_b = nn.Linear(hidden, heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, heads, bias=False)
        self.conv1d = Conv1d(channels, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = RMSNormGated(config.linear_value_head_dim, config.rms_norm_eps, kernels)
        self.out_proj = nn.Linear(value, hidden, bias=False)
        self.core = DeltaNetCore(config, kernels)

    def forward(
        self, x: Tensor, norm: RMSNorm, cu_seqlens: Tensor, recompute_cache: RecomputeCache | None = None
    ) -> Tensor:
        """x [T, H] before `norm` -> [T, H]"""
        qkv, z, b, a = norm.project(x, self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        beta = b.float().sigmoid()  # [T, Hv]
        g = -self.A_log.float().exp() * F.softplus(a + self.dt_bias.float())
        out = self.core(qkv, g, beta, self.conv1d.weight.squeeze(1), cu_seqlens, recompute_cache)  # [T, Hv, Dv]
        out = self.norm(out, z.view_as(out))
        return recomputed_linears(None, [self.out_proj], rearrange(out, "t h d -> t (h d)"))[0]
