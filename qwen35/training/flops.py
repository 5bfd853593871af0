"""Model FLOPs of a packed batch: what the maths needs, forward and backward, without recomputation.

The backward pass costs as much as the forward pass for the gradients of the weights, and as much
again for the gradients of the inputs. The first are counted where the weight is trained, the second
where something before it is trained; a frozen part costs its forward pass alone. Before the B of an
adapter there is always something trained, its A. Of pairs of answers, the reference's forward pass
counts where it runs in the step, and so does the head's second one.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qwen35.batch import IGNORE, MTPTargets, PackedBatch
from qwen35.model import Qwen35
from qwen35.model.lora import is_adapter
from qwen35.model.moe import ADAPTERS

DELTA_RULE_CHUNK = 64  # tokens per chunk of the gated delta rule
Weights = Mapping[str, Tensor]


def token_counts(batch: PackedBatch) -> tuple[int, int, int]:
    """A batch on the host -> tokens that are not padding, tokens with a label, visual tokens."""
    pad = 0 if batch.is_pad is None else int(batch.is_pad.sum())
    images = 0 if batch.vision_index is None else int((batch.vision_index >= 0).sum())
    return len(batch.input_ids) - pad, int((batch.labels != IGNORE).sum()), images


class Flops:
    """FLOPs of a model with its frozen parts, plain or sharded, from the pixels to the heads."""

    def __init__(self, model: Qwen35):
        self.config = model.config
        # FLOPs for each token, pair, label, mtp_label, patch and patch_pair
        self.flops_per: dict[str, float] = defaultdict(float)
        self.forward_per: dict[str, float] = defaultdict(float)  # of a forward pass alone, without adapters
        self.is_trained_below = False  # whether the next part must pass a gradient on to its input
        text = model.model.language_model
        if model.model.visual is not None:
            self._tower(model.model.visual)
        self._maps("token", (text.embed_tokens, 0))
        for layer in text.layers:
            self._layer(layer)
        self._maps("token", text.norm)
        head = text.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        below = self.is_trained_below
        self._maps("label", head)
        if hasattr(model, "mtp"):
            self.is_trained_below = below
            self._maps("token", model.mtp.pre_fc_norm_embedding, model.mtp.pre_fc_norm_hidden)
            self._maps("token", model.mtp.fc)
            self._layer(model.mtp.layers[0])
            self._maps("token", model.mtp.norm)
            self._maps("mtp_label", head)

    def of_batch(self, batch: PackedBatch, counts: tuple[int, int, int], mtp_targets: MTPTargets | None) -> float:
        """Padding and the dummy image are computed, but not counted."""
        tokens, labels, image_tokens = counts
        lengths, starts = batch.cu_seqlens.diff(), batch.cu_seqlens[:-1].long()
        if batch.is_pad is not None:
            lengths = lengths[~batch.is_pad[starts]]
        patches = image_tokens * self.config.vision.spatial_merge_size**2 if self.config.vision else 0
        grids = batch.grid_thw[batch.grid_thw.prod(-1).cumsum(0) <= patches]
        flops = self.of(tokens, lengths, labels, grids, len(mtp_targets.label_positions) if mtp_targets else 0)
        if batch.pairs is not None:
            flops += labels * self.forward_per["label"]  # again in the backward pass, see token_log_probs
            if batch.reference is None:
                flops += self.of(tokens, lengths, labels, grids, forward=True)
        return flops

    def of(
        self, tokens: int, lengths: Tensor, labels: int, grid_thw: Tensor, mtp_labels: int = 0, forward: bool = False
    ) -> float:
        """FLOPs of sequences of `lengths` [S]; the head counts at labels only, those of MTP too.

        forward: of a forward pass alone, without adapters.
        """
        flops_per = self.forward_per if forward else self.flops_per
        frames, patches = grid_thw[:, 0], grid_thw[:, 1] * grid_thw[:, 2]
        counts = {
            "token": tokens,
            "pair": float((lengths.double().square() / 2).sum()),  # a query and a key it attends to
            "label": labels,
            "mtp_label": mtp_labels,
            "patch": float((frames * patches).sum()),
            "patch_pair": float((frames * patches**2).sum()),
        }
        return sum(count * flops_per.get(unit, 0.0) for unit, count in counts.items())

    def _maps(self, unit: str, *maps: nn.Module | Weights | tuple[nn.Module | Weights, float]) -> None:
        """Modules and weights that read the same input, each with the share of units that reach it.

        Without a number all do. An embedding's share is 0: a lookup costs nothing.
        """
        weights: list[tuple[str, Tensor, float]] = []
        for part in maps:
            found, share = part if isinstance(part, tuple) else (part, 1)
            named = found.named_parameters() if isinstance(found, nn.Module) else found.items()
            weights += [(name, w, share) for name, w in named]
        for name, w, share in weights:
            if w.ndim > 1:
                cost = 2 * (1 + (self.is_trained_below or name.endswith("lora_B")))
                self.flops_per[unit] += w.numel() * share * (cost + 2 * w.requires_grad)
                self.forward_per[unit] += w.numel() * share * 2 * (not is_adapter(name))
        self.is_trained_below |= any(w.requires_grad for _, w, _ in weights)

    def _core(self, unit: str, flops: float) -> None:
        """An operation without weights."""
        self.flops_per[unit] += flops * (3 if self.is_trained_below else 1)
        self.forward_per[unit] += flops

    def _layer(self, layer: Any) -> None:
        t = self.config.text
        self._maps("token", layer.input_layernorm)
        if layer.is_attention:
            attention = layer.self_attn
            self._maps("token", attention.q_proj, attention.k_proj, attention.v_proj)
            self._maps("token", attention.q_norm, attention.k_norm)
            self._core("pair", 4 * t.num_attention_heads * t.head_dim)
            self._maps("token", attention.o_proj)
        else:
            delta, dk, dv = layer.linear_attn, t.linear_key_head_dim, t.linear_value_head_dim
            self._maps("token", delta.in_proj_qkv, delta.in_proj_z, delta.in_proj_b, delta.in_proj_a)
            self._maps("token", delta.conv1d, {"A_log": delta.A_log, "dt_bias": delta.dt_bias})
            rule = 4 * DELTA_RULE_CHUNK * dk + DELTA_RULE_CHUNK * (dk + dv) + 6 * dk * dv + 2 * DELTA_RULE_CHUNK * dv
            self._core("token", t.linear_num_value_heads * rule)
            self._maps("token", delta.norm)
            self._maps("token", delta.out_proj)
        self._maps("token", layer.post_attention_layernorm)
        mlp = layer.mlp
        if layer.is_moe:
            shared, experts, routed = mlp.shared_expert, mlp.experts, t.num_experts_per_tok / t.num_experts
            gate_up, down = (
                {name: w for name, w in experts.named_parameters() if name.startswith(stack)} for stack in ADAPTERS
            )
            both = (shared.gate_proj, shared.up_proj)
            self._maps("token", mlp.gate, mlp.shared_expert_gate, *both, (gate_up, routed))
            self._maps("token", shared.down_proj, (down, routed))
        else:
            self._maps("token", mlp.gate_proj, mlp.up_proj)
            self._maps("token", mlp.down_proj)

    def _tower(self, tower: Any) -> None:
        v = self.config.vision
        assert v is not None  # there is a tower
        self._maps("patch", tower.patch_embed, (tower.pos_embed, 0))
        for block in tower.blocks:
            self._maps("patch", block.norm1)
            self._maps("patch", block.attn.qkv)
            self._core("patch_pair", 4 * v.hidden_size)
            for part in (block.attn.proj, block.norm2, block.mlp.linear_fc1, block.mlp.linear_fc2):
                self._maps("patch", part)
        merged = 1 / v.spatial_merge_size**2
        self._maps("patch", tower.merger.norm)
        self._maps("patch", (tower.merger.linear_fc1, merged))
        self._maps("patch", (tower.merger.linear_fc2, merged))
