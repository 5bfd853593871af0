"""A layout's memory and time by arithmetic, from those of another that was rehearsed."""

from dataclasses import dataclass, replace
from typing import Any

from qwen35.config.schema import Settings
from qwen35.model import ModelConfig
from qwen35.training.adapters import build_model
from rehearse.layouts import Layout
from rehearse.lower_bound import RESHARDED, mixer_bytes
from rehearse.rates import BEST, WORST, RateRange, Rates
from rehearse.step_time import Times


@dataclass(frozen=True)
class Figures:
    """Of a rehearsed layout, or an estimate of them."""

    bytes: int  # an NPU must hold at the peak
    kinds: dict[str, int]  # of these, by what holds them
    pinned: int  # bytes of page-locked memory of a node
    best: Times
    worst: Times

    @classmethod
    def read(cls, found: dict[str, Any]) -> "Figures":
        return cls(**found | {name: Times(**found[name]) for name in ("best", "worst")})


@dataclass(frozen=True)
class Sizes:
    """Of a model and a cluster: what the bytes that a layout sends and gathers depend on."""

    world: int
    per_node: int
    layers: int
    top_k: int  # 0: dense
    row: int  # bytes of a token's hidden state
    mixers: dict[int, float]  # Ulysses degree -> bytes of one token that enter and leave all mixers
    cutoff_len: int
    experts: int  # parameters
    others: int  # of the layers, without experts
    ends: int  # of the embedding and the head
    trained: float  # share of the parameters

    @classmethod
    def of(cls, s: Settings, config: ModelConfig, world: int, per_node: int) -> "Sizes":
        named = dict(build_model(s, config).named_parameters())
        experts = sum(p.numel() for name, p in named.items() if ".mlp.experts." in name)
        inside = sum(p.numel() for name, p in named.items() if name.startswith(RESHARDED))
        total = sum(p.numel() for p in named.values())
        text = config.text
        return cls(
            world,
            per_node,
            len(text.layer_types),
            text.num_experts_per_tok if text.num_experts else 0,
            text.hidden_size * 2,
            {u: mixer_bytes(text, u, 2, bool(s.model.mtp_num_layers)) for u in range(1, per_node + 1)},
            s.data.dataset_param.basic_parameters.cutoff_len,
            experts,
            inside - experts,
            total - inside,
            sum(p.numel() for p in named.values() if p.requires_grad) / total,
        )

    def tokens(self, c: Layout) -> int:
        """Of a rank and micro-batch."""
        return c.micro_batch * self.cutoff_len // c.ulysses

    def gathered(self, c: Layout) -> float:
        """In proportion to the bytes of gathered parameters and their gradients."""
        return 4 * (self.others + self.experts / c.expert) / self.layers + 2 * self.ends

    def communication(self, c: Layout, rates: Rates, hierarchical: bool) -> float:
        """Seconds of a step."""
        shard = c.shard or self.world
        nodes, fsdp = max(1, shard // self.per_node), shard // c.expert
        gather, scatter = 2 * 2, 4 * self.trained  # bytes a parameter: bf16 forward and backward, fp32 gradients
        tokens, copies = self.tokens(c), self.world // shard
        sent = [  # bytes of a micro-batch, ranks, nodes
            ((self.others * (gather + scatter) + self.ends * (2 + scatter)) * (1 - 1 / shard), shard, nodes),
            (self.experts / c.expert * (gather + scatter) * (1 - 1 / fsdp), fsdp, min(fsdp, nodes)),
        ]
        if c.expert > 1:
            times = (5 if c.recompute else 4) * min(self.top_k, c.expert)  # recomputed experts send nothing back
            rows = times * self.layers * tokens * self.row * (1 - 1 / c.expert)
            sent.append((rows, c.expert, max(1, c.expert // self.per_node)))
        if c.ulysses > 1:
            sent.append((2 * self.mixers[c.ulysses] * tokens * (1 - 1 / c.ulysses), c.ulysses, 1))
        if copies > 1:
            mean = 2 * 4 * self.trained * (self.experts + self.others + self.ends) / shard
            sent.append((mean * (1 - 1 / copies), copies, copies))
        seconds = 0.0
        for size, ranks, over in sent:
            between = size * (over - 1) / max(1, ranks - 1)
            if over == 1:
                seconds += size / rates.within
            elif hierarchical:
                seconds += max(between / rates.between, (size - between) / rates.within)
            else:
                seconds += size / rates.between
        return seconds * c.accumulation

    def seconds(self, c: Layout) -> float:
        """To order layouts before any rehearsal: both ends of the communication, multiplied."""
        return self.communication(c, BEST, True) * self.communication(c, WORST, False)


def estimate(c: Layout, probe: Layout, known: Figures, sizes: Sizes, rates: RateRange) -> Figures:
    """Of layout c, from what is known of a probe that keeps its activations in the same way."""
    kinds = dict.fromkeys(("parameters", "gradients", "optimizer", "gathered", "activations"), 0) | known.kinds
    fixed = known.bytes - sum(kinds.values())
    shards = (probe.shard or sizes.world) / (c.shard or sizes.world)
    kinds["parameters"] = int(kinds["parameters"] * shards)
    # in a step's only micro-batch gradients grow as activations go, unless the host has these
    has_gradients = c.accumulation > 1 or c.offload
    kinds["gradients"] = int(kinds["parameters"] * sizes.trained) if has_gradients else 0
    kinds["optimizer"] = 0 if c.optimizer == "adamw_swap" else 2 * int(kinds["parameters"] * sizes.trained)
    kinds["gathered"] = int(kinds["gathered"] * sizes.gathered(c) / sizes.gathered(probe))
    kinds["activations"] = int(kinds["activations"] * sizes.tokens(c) / sizes.tokens(probe))

    def times(t: Times, at: Rates, hierarchical: bool) -> Times:
        moments = 2 * 8 * sizes.trained * (sizes.experts + sizes.others + sizes.ends)  # to the host and back
        swapped = moments / (c.shard or sizes.world) * (c.optimizer == "adamw_swap")
        swapped -= moments / (probe.shard or sizes.world) * (probe.optimizer == "adamw_swap")
        return replace(
            t,
            communication=sizes.communication(c, at, hierarchical),
            copies=max(0.0, t.copies + swapped / at.copies),
            host=t.host * c.accumulation / probe.accumulation,
        )

    best, worst = times(known.best, rates.best, True), times(known.worst, rates.worst, False)
    return Figures(fixed + sum(kinds.values()), kinds, known.pinned, best, worst)
