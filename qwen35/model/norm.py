"""RMS norms as modules: the weight, and the kernel that uses it."""

import torch
from torch import Tensor, nn

from kernels import Kernels
from qwen35.model.linear import recomputed_linears


class RMSNorm(nn.Module):
    """Zero-centred: y = x_hat * (1 + weight)."""

    def __init__(self, dim: int, eps: float, kernels: Kernels):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps, self.kernel = eps, kernels.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.eps)

    def project(self, x: Tensor, *projections: nn.Linear) -> tuple[Tensor, ...]:
        """x [T, H] -> projections of norm(x). Saves x; backward computes the norm again."""
        return recomputed_linears(lambda x, weight: self.kernel(x, weight, self.eps), projections, x, self.weight)


class RMSNormGated(nn.Module):
    """y = weight * x_hat * silu(gate); the weight starts at one."""

    def __init__(self, dim: int, eps: float, kernels: Kernels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.kernel = eps, kernels.rms_norm_gated

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.kernel(x, gate, self.weight, self.eps)
