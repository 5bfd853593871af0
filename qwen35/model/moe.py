"""The feed-forward block: a dense MLP, or routed experts and a shared expert."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import Kernels
from kernels.moe_lora import ExpertAdapters
from kernels.recompute_cache import RecomputeCache
from qwen35.model.config import TextConfig
from qwen35.model.linear import recomputed_linear, recomputed_linears


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int, kernels: Kernels):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.swiglu = kernels.swiglu

    def forward(self, x: Tensor, scale: nn.Linear | None = None) -> Tensor:
        """x [T, H] -> [T, H], times sigmoid(scale(x)) if scale, a projection to [T, 1], is given"""
        projections = [self.gate_proj, self.up_proj, *([] if scale is None else [scale])]
        gate, up, *scales = recomputed_linears(None, projections, x)
        gate_up = torch.cat([gate, up], dim=-1)
        return recomputed_linear(self._hidden, self.down_proj, gate_up, *scales)

    def _hidden(self, gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
        hidden = self.swiglu(gate_up)
        return hidden if scale is None else hidden * scale.sigmoid()


class Router(nn.Module):
    """Softmax over all experts, top k, renormalised: a softmax of the top-k logits, in fp32."""

    def __init__(self, hidden: int, experts: int, top_k: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.top_k = top_k

    def forward(self, x: Tensor, stats_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H], stats_mask [T] fp32 -> topk_ids [T, K], topk_weights [T, K] fp32, stats [2, E].

        stats, fp32: each expert's summed probability and how often it was chosen, over the tokens
        whose stats_mask is 1 (else 0).
        """
        logits = recomputed_linear(Tensor.float, self.weight.float(), x)
        top_logits, ids = logits.topk(self.top_k, dim=-1)
        chosen = torch.zeros_like(logits).scatter_(1, ids, 1.0)  # [T, E]
        stats = torch.stack([stats_mask @ logits.softmax(-1), stats_mask @ chosen])
        return ids, top_logits.softmax(-1), stats


# projection of the routed experts -> its adapter's parameters, [E, r, in] and [E, out, r]
ADAPTERS = {stack: (f"{stack}_lora_A", f"{stack}_lora_B") for stack in ("gate_up", "down")}


class Experts(nn.Module):
    """The stacked weights of the routed experts. Expert parallelism replaces it."""

    scale = 0.0  # of the adapters; 0: without them

    def __init__(self, config: TextConfig, kernels: Kernels):
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.kernel, self.parallel_kernel = kernels.moe_experts, kernels.moe_experts_parallel

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, cache: RecomputeCache | None = None) -> Tensor:
        """x [T, H]; ids [T, K] of experts, weights [T, K] of theirs -> [T, H]"""
        stacks = self.gate_up_proj, self.down_proj
        return self.kernel(x, ids, weights, *stacks, adapters=self.adapters(), recompute_cache=cache)

    def add_adapter(self, stack: str, r: int, scale: float) -> None:
        """One for each expert, of the frozen weight `<stack>_proj`; undefined until loaded."""
        weight = self.get_parameter(f"{stack}_proj")
        experts, out, inner = weight.shape
        for name, shape in zip(ADAPTERS[stack], ((experts, r, inner), (experts, out, r)), strict=True):
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=weight.device)))
        self.scale = scale

    def adapters(self, local: Callable[[Tensor], Tensor] = lambda x: x) -> ExpertAdapters | None:
        """`local` is applied to each parameter."""
        if not self.scale:
            return None
        pairs = ([local(getattr(self, n)) for n in names if hasattr(self, n)] for names in ADAPTERS.values())
        gate_up, down = ((pair[0], pair[1]) if pair else None for pair in pairs)
        return ExpertAdapters(self.scale, gate_up, down)


class MoE(nn.Module):
    def __init__(self, config: TextConfig, kernels: Kernels):
        super().__init__()
        hidden = config.hidden_size
        self.gate = Router(hidden, config.num_experts, config.num_experts_per_tok)
        self.experts: nn.Module = Experts(config, kernels)
        self.shared_expert = MLP(hidden, config.shared_expert_intermediate_size, kernels)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor, stats_mask: Tensor, cache: RecomputeCache | None = None) -> tuple[Tensor, Tensor]:
        """x [T, H] -> y [T, H], the router's stats [2, E]"""
        ids, weights, stats = self.gate(x, stats_mask)
        return self.experts(x, ids, weights, cache) + self.shared_expert(x, self.shared_expert_gate), stats


def load_balancing_loss(stats: Tensor, top_k: int) -> Tensor:
    """stats [2, E] -> scalar fp32, E * sum_e (fraction of choices of e) * (its mean probability).

    Both are means over the tokens of all layers, pooled as in transformers. Perfect balance gives
    top_k. Source: Fedus et al. 2021, Switch Transformer, equations 4 to 6.
    """
    probability, chosen = stats
    rows = (chosen.sum() / top_k).clamp(min=1)  # tokens x layers; clamped so that the loss of no tokens is 0
    return len(chosen) * (chosen / rows * probability / rows).sum()
