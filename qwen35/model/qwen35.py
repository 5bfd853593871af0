"""Qwen3.5, dense and mixture of experts. Parameter names and layouts are the checkpoint's own.

The model knows no files and no processes; sharding and context parallelism act from outside.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import Kernels
from kernels.recompute_cache import RecomputeCache
from qwen35.batch import MTPTargets, PackedBatch, derive
from qwen35.model.attention import Attention
from qwen35.model.config import ModelConfig, TextConfig, load_config
from qwen35.model.gated_delta_net import GatedDeltaNet
from qwen35.model.moe import MLP, MoE, load_balancing_loss
from qwen35.model.mtp import MultiTokenPrediction
from qwen35.model.norm import RMSNorm, RMSNormGated
from qwen35.model.rope import Rope, text_rope
from qwen35.model.vision import VisionTower

Stats = list[Tensor]  # router statistics, [2, E] per MoE layer; empty for a dense model


class Stash(AbstractContextManager[None], Protocol):
    """Offloads what autograd saves in its context; a RecomputeCache calls pack and unpack."""

    def pack(self, x: Tensor) -> Any: ...
    def unpack(self, packed: Any) -> Tensor: ...


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, kind: str, kernels: Kernels):
        super().__init__()
        if kind == "full_attention":
            self.self_attn = Attention(config, kernels)
        else:
            self.linear_attn = GatedDeltaNet(config, kernels)
        self.mlp: MLP | MoE
        if config.num_experts:
            self.mlp = MoE(config, kernels)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, kernels)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.is_attention, self.is_moe = kind == "full_attention", bool(config.num_experts)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cu_seqlens: Tensor,
        stats_mask: Tensor,
        recompute_cache: RecomputeCache | None = None,
    ) -> tuple[Tensor, Stats]:
        """x [T, H] -> [T, H], router stats of the tokens where stats_mask [T] fp32 is 1, not 0"""
        norm = self.input_layernorm
        core_cache = recompute_cache if recompute_cache and recompute_cache.keeps_outputs else None
        if self.is_attention:
            x = x + self.self_attn(x, norm, rope, cu_seqlens, core_cache)
        else:
            x = x + self.linear_attn(x, norm, cu_seqlens, core_cache)
        normed = self.post_attention_layernorm(x)
        if not self.is_moe:
            return x + self.mlp(normed), []
        y, stats = self.mlp(normed, stats_mask, recompute_cache)
        return x + y, [stats]


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig, kernels: Kernels):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, kind, kernels) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        # True: save only each layer's input for backward; "selective": also its core's output
        self.recompute: bool | str = False
        # (layer, tensors that all layers share, the previous layer's stash, is_last) -> stash
        self.offload: Callable[[nn.Module, list[Tensor], Any, bool], Stash] | None = None

    def rope(self, position_ids: Tensor) -> Rope:
        c = self.config
        return text_rope(position_ids, c.rotary_dim, c.rope_theta, c.mrope_section, c.yarn)

    def forward(self, x: Tensor, batch: PackedBatch) -> tuple[Tensor, Stats]:
        """x [T, H], embedded tokens -> hidden [T, H] after the final norm, router stats"""
        rope = self.rope(batch.position_ids)
        stats: Stats = []
        stats_mask = torch.ones(len(x), device=x.device) if batch.is_pad is None else (~batch.is_pad).float()
        stash: Stash | None = None
        for i, layer in enumerate(self.layers, 1):
            if self.offload and torch.is_grad_enabled():
                stash = self.offload(layer, [*rope, stats_mask], stash, i == len(self.layers))
            x, layer_stats = self.run(layer, x, rope, batch.cu_seqlens, stats_mask, stash=stash)
            stats += layer_stats
        return self.norm(x), stats

    def run(
        self, layer: Callable[..., tuple[Tensor, Stats]], *inputs: Any, stash: Stash | None = None
    ) -> tuple[Tensor, Stats]:
        """layer(*inputs, cache), recomputed if self.recompute; `stash` offloads saved tensors."""
        with stash or nullcontext():
            if not self.recompute:
                return layer(*inputs, None)
            storage = (stash.pack, stash.unpack) if stash else ()
            is_layer = isinstance(layer, DecoderLayer)  # multi-token prediction normalizes what its layer returns
            cache = RecomputeCache(self.recompute == "selective", is_layer, *storage)
            # layers draw no random numbers, so the RNG state need not be saved
            checkpointed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=cache.contexts)
            return checkpointed(layer, *inputs, cache)


class _ScatterFeatures(torch.autograd.Function):
    """x [T, H] with the rows of image tokens replaced by features [P/4, H], as vision_index says.

    The vision tower is in the graph whatever the data. Both directions are gathers: the backward of
    autograd's own gather would add the zeros of all text tokens to one row, in no fixed order, and
    serially on an NPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, features: Tensor, vision_index: Tensor, vision_token: Tensor) -> Tensor:
        ctx.save_for_backward(vision_index, vision_token)
        ctx.dtype = features.dtype
        vision_rows = features.index_select(0, vision_index.clamp(min=0)).to(x.dtype)
        return torch.where((vision_index >= 0)[:, None], vision_rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        vision_index, vision_token = ctx.saved_tensors
        need_x, need_features, *_ = ctx.needs_input_grad
        grad_x = grad.masked_fill((vision_index >= 0)[:, None], 0) if need_x else None
        grad_features = None
        if need_features:
            grad_features = grad.index_select(0, vision_token.clamp(min=0)).to(ctx.dtype)
            grad_features.masked_fill_((vision_token < 0)[:, None], 0)
        return grad_x, grad_features, None, None


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.visual = None if config.vision is None else VisionTower(config.vision, kernels)
        self.language_model = LanguageModel(config.text, kernels)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Stats]:
        return self.language_model(self.embed(batch), batch)

    def embed(self, batch: PackedBatch) -> Tensor:
        """-> [T, H], token embeddings, those of image tokens replaced by image features"""
        features = None if self.visual is None else self.visual(batch.pixel_values, batch.vision)
        x = self.language_model.embed_tokens(batch.input_ids)
        if batch.embedding_noise is not None:
            x = x + batch.embedding_noise.to(x.dtype)
        if features is None:
            return x
        assert batch.vision_index is not None and batch.vision_token is not None  # by derive()
        return _ScatterFeatures.apply(x, features, batch.vision_index, batch.vision_token)


class Qwen35(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels | None = None, mtp: bool = False):
        super().__init__()
        kernels = kernels or Kernels()
        self.config, self.kernels = config, kernels
        self.model = Backbone(config, kernels)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if mtp:
            layer = DecoderLayer(config.text, "full_attention", kernels)
            self.mtp = MultiTokenPrediction(config.text, layer, kernels)
        self.cross_entropy, self.token_log_probs = kernels.linear_cross_entropy, kernels.token_log_probs
        self.sum_stats = nn.Identity()  # context parallelism replaces it

    @classmethod
    def from_config(cls, source: str | Path | dict[str, Any], seed: int = 0, **kwargs: Any) -> "Qwen35":
        """Random weights, fp32, for a folder with config.json or for its contents."""
        model = cls(load_config(source), **kwargs)
        init_weights(model, torch.Generator().manual_seed(seed))
        return model

    def recompute(self, how: bool | str) -> None:
        """Set LanguageModel.recompute; unless False, vision blocks save only their inputs."""
        self.model.language_model.recompute = how
        if self.model.visual is not None:
            self.model.visual.recompute = bool(how)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]"""
        return self.model.language_model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, batch: PackedBatch) -> Tensor:
        """-> hidden [T, H], after the final norm"""
        return self.model(derive(batch, self.config.vision_spec))[0]

    def logits(self, batch: PackedBatch) -> Tensor:
        """-> [T, V], all at once: for tests and small inputs"""
        return self(batch) @ self.head_weight.T

    def loss(
        self,
        batch: PackedBatch,
        token_weights: Tensor,
        mtp_targets: MTPTargets | None = None,
        mtp_factor: float = 1.0,
        load: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> sum(token_weights * cross entropy), load-balancing loss, cross entropies [T].

        With `mtp_targets` multi-token prediction is trained too: mtp_factor times its loss is added
        to the first result, its router counts in the second, and its cross entropies are appended
        to the third, [2T]. Both predictions share one pass through the head, whose large gradient
        is then computed once. load [L, E] grows by how often these tokens chose each expert.
        """
        batch = derive(batch, self.config.vision_spec)
        x = self.model.embed(batch)
        labels, label_rows = batch.labels, batch.label_positions
        inputs = x if len(x) == len(labels) else x[: len(labels)]  # x may include the next rank's first token
        hidden, stats = self.model.language_model(inputs, batch)
        if mtp_targets is not None:
            mtp_hidden, mtp_stats = self._mtp_hidden(hidden, x, batch, mtp_targets)
            hidden, stats = torch.cat([hidden, mtp_hidden]), stats + mtp_stats
            if label_rows is not None:
                label_rows = torch.cat([label_rows, mtp_targets.label_positions + len(labels)])
            token_weights = torch.cat([token_weights, mtp_factor * mtp_targets.weights])
            labels = torch.cat([labels, mtp_targets.labels])
        loss, token_loss = self.cross_entropy(hidden, self.head_weight, labels, token_weights, label_rows)
        if load is not None:
            load += torch.stack(stats)[:, 1].detach()
        return loss, self._aux(stats, hidden), token_loss

    def log_probs(self, batch: PackedBatch, load: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> log-probabilities of the labels [T], load-balancing loss. load: as for `loss`."""
        batch = derive(batch, self.config.vision_spec)
        hidden, stats = self.model(batch)
        log_probs = self.token_log_probs(hidden, self.head_weight, batch.labels, batch.label_positions)
        if load is not None:
            load += torch.stack(stats)[:, 1].detach()
        return log_probs, self._aux(stats, hidden)

    def _mtp_hidden(
        self, hidden: Tensor, x: Tensor, batch: PackedBatch, mtp_targets: MTPTargets
    ) -> tuple[Tensor, Stats]:
        """hidden [T, H], embedded tokens x -> hidden [T, H] for the token after the next, stats.

        x is [T, H], or [T + 1, H] if the last token's sequence continues on another rank.
        """
        text = self.model.language_model
        rope = text.rope(batch.position_ids)
        # a sequence's last token has no next token: its input is zeros, and no statistic counts it
        stats_mask = (~(mtp_targets.is_end if batch.is_pad is None else mtp_targets.is_end | batch.is_pad)).float()

        def layer(hidden: Tensor, x: Tensor, recompute_cache: RecomputeCache | None) -> tuple[Tensor, Stats]:
            missing = x.new_zeros(len(hidden) + 1 - len(x), x.shape[1])
            next_tokens = torch.cat([x[1:], missing]).masked_fill(mtp_targets.is_end[:, None], 0)
            return self.mtp(hidden, next_tokens, rope, batch.cu_seqlens, stats_mask, recompute_cache)

        return text.run(layer, hidden, x)

    def _aux(self, stats: Stats, hidden: Tensor) -> Tensor:
        if not stats:
            return hidden.new_zeros(()).float()
        return load_balancing_loss(self.sum_stats(torch.stack(stats).sum(0)), self.config.text.num_experts_per_tok)


@torch.no_grad()
def init_weights(model: Qwen35, generator: torch.Generator) -> None:
    """Random weights as in transformers: normal matrices, zero biases, norms at identity."""
    std = model.config.text.initializer_range
    by_name: dict[str, Callable[[Tensor], Tensor]] = {
        "A_log": lambda p: p.uniform_(0.01, 16, generator=generator).log_(),
        "dt_bias": lambda p: p.fill_(1),
        "bias": lambda p: p.zero_(),
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name in by_name:
                by_name[name](parameter)
            elif isinstance(module, nn.LayerNorm | RMSNormGated):
                parameter.fill_(1)
            elif isinstance(module, RMSNorm):
                parameter.zero_()
            else:
                parameter.normal_(0, std, generator=generator)
