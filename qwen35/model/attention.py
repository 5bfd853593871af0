"""Full attention with an output gate: one layer in four."""

from einops import rearrange
from torch import Tensor, nn

from kernels import Kernels
from kernels.attention import Prepare
from kernels.recompute_cache import RecomputeCache
from qwen35.model.config import TextConfig
from qwen35.model.linear import recomputed_linear
from qwen35.model.norm import RMSNorm
from qwen35.model.rope import Rope


class AttentionCore(nn.Module):
    """Attention between the projections, without parameters. Context parallelism replaces it."""

    def __init__(self, kernels: Kernels, causal: bool = True):
        super().__init__()
        self.kernel, self.causal = kernels.varlen_attention, causal

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        prepare: Prepare | None = None,
        *inputs: Tensor,
        recompute_cache: RecomputeCache | None = None,
    ) -> Tensor:
        """q [T, Hq, D]; k, v [T, Hkv, D] -> [T, Hq, D]; `prepare` as in kernels/attention.py."""
        scale = q.shape[-1] ** -0.5
        return self.kernel(q, k, v, cu_seqlens, self.causal, scale, prepare, inputs, recompute_cache)


class Attention(nn.Module):
    def __init__(self, config: TextConfig, kernels: Kernels):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim * 2, bias=False)  # query and gate
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, kernels)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, kernels)
        self.core = AttentionCore(kernels)
        self.rotary = kernels.apply_rotary

    def forward(
        self, x: Tensor, norm: RMSNorm, rope: Rope, cu_seqlens: Tensor, recompute_cache: RecomputeCache | None = None
    ) -> Tensor:
        """x [T, H] before `norm` -> [T, H]"""
        q, k, v = norm.project(x, self.q_proj, self.k_proj, self.v_proj)
        q, gate = rearrange(q, "t (h d) -> t h d", d=2 * self.head_dim).chunk(2, dim=-1)
        k, v = (rearrange(y, "t (h d) -> t h d", d=self.head_dim) for y in (k, v))
        inputs = self.q_norm.weight, self.k_norm.weight, *rope
        out = self.core(q, k, v, cu_seqlens, self.prepare, *inputs, recompute_cache=recompute_cache)
        return recomputed_linear(lambda o, g: rearrange(o * g.sigmoid(), "t h d -> t (h d)"), self.o_proj, out, gate)

    def prepare(
        self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Norm and rotary embedding of q [T, Hq, D], k [T, Hkv, D]; computed again in backward."""
        norm, eps = self.q_norm.kernel, self.q_norm.eps
        return self.rotary(norm(q, q_weight, eps), norm(k, k_weight, eps), cos, sin)
