"""Multi-token prediction: one more layer, which predicts the token after the next.

It sees the hidden state and the next token. Source: DeepSeek-V3, arXiv:2412.19437, section 2.2.
Parameter names are the checkpoints' (`mtp.…`, beside `model`).
"""

import torch
from torch import Tensor, nn

from kernels import Kernels
from kernels.recompute_cache import RecomputeCache
from qwen35.model.config import TextConfig
from qwen35.model.norm import RMSNorm
from qwen35.model.rope import Rope


class MultiTokenPrediction(nn.Module):
    def __init__(self, config: TextConfig, layer: nn.Module, kernels: Kernels):
        super().__init__()
        self.pre_fc_norm_embedding = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.pre_fc_norm_hidden = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([layer])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def forward(
        self,
        hidden: Tensor,
        next_embedding: Tensor,
        rope: Rope,
        cu_seqlens: Tensor,
        stats_mask: Tensor,
        recompute_cache: RecomputeCache | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """hidden, next_embedding [T, H] of token t+1 -> hidden [T, H] for token t+2, stats"""
        both = [self.pre_fc_norm_embedding(next_embedding), self.pre_fc_norm_hidden(hidden)]
        x, stats = self.layers[0](self.fc(torch.cat(both, dim=-1)), rope, cu_seqlens, stats_mask, recompute_cache)
        return self.norm(x), stats
