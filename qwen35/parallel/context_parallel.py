"""Ulysses context parallelism: U ranks share each micro-batch, T/U of its T tokens each.

Operations on single tokens (norms, projections, experts) work on T/U tokens. Attention and the
delta net need whole sequences: an all-to-all before them gives each rank all T tokens of its heads,
and one after them restores the T/U tokens of all heads. The vision tower shards its patches in the
same way and gathers its features at the end. Source: Jacobs et al. 2023, DeepSpeed Ulysses,
arXiv:2309.14509.

U must divide the numbers of heads; if it is a multiple of the number of KV heads, each KV head goes
to several ranks. All shapes follow from the settings, and no exchange waits for the host.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwen35.batch import MTPTargets, PackedBatch
from qwen35.model import Qwen35
from qwen35.model.attention import Attention, AttentionCore
from qwen35.model.gated_delta_net import DeltaNetCore, GatedDeltaNet
from qwen35.model.vision import VisionAttention
from qwen35.parallel.collectives import Gather, Sum, to_heads, to_tokens
from qwen35.parallel.mesh import Meshes

# ── Applied to a model and to its batches ─────────────────────────────────────────────────────────


def apply_context_parallel(model: Qwen35, meshes: Meshes) -> None:
    """Make a plain, unsharded model work on the output of shard_batch. Changes no parameter."""
    if meshes.ulysses_size == 1:
        return
    group = meshes.tokens["ulysses"].get_group()
    for module in list(model.modules()):
        if isinstance(module, Attention | VisionAttention):
            module.register_module("core", UlyssesAttention(module.core, group))
        elif isinstance(module, GatedDeltaNet):
            module.register_module("core", UlyssesDeltaNet(module.core, group))
    if model.model.visual is not None:
        model.model.visual.register_module("gather_features", OverGroup(Gather, group))  # [N/U, H] -> [N, H]
    model.register_module("sum_stats", OverGroup(Sum, group))  # the routers', [2, E] -> [2, E]


def shard_batch(
    batch: PackedBatch, weights: Tensor, mtp_targets: MTPTargets | None, rank: int, size: int
) -> tuple[PackedBatch, Tensor, MTPTargets | None]:
    """A rank's part of a micro-batch on the host, of its token weights [T] and of its MTP targets.

    The batch must have all derived fields. The part has T/size tokens and P/size patches;
    `label_positions` counts from its first token. What only attention and the delta net read stays
    whole: cu_seqlens, position_ids, the patch layout's cu_seqlens and positions, grid_thw. With MTP
    targets, input_ids and vision_index also have the next part's first token, which saves an
    exchange. Raises ValueError if `size` does not divide the tokens or the patches.
    """
    if size == 1:
        return batch, weights, mtp_targets
    tokens, patches = len(batch.labels), len(batch.pixel_values)
    if tokens % size or patches % size:
        raise ValueError(f"{tokens} tokens and {patches} patches cannot be shared by {size} ranks evenly")
    tokens_here = slice(rank * tokens // size, (rank + 1) * tokens // size)
    input_rows = slice(tokens_here.start, tokens_here.stop + (mtp_targets is not None))
    part = dataclasses.replace(
        batch,
        input_ids=_pad_rows(batch.input_ids, input_rows, 0),
        labels=batch.labels[tokens_here],
        label_positions=None if batch.label_positions is None else _within(batch.label_positions, tokens_here),
        is_pad=None if batch.is_pad is None else batch.is_pad[tokens_here],
    )
    if batch.vision is not None:  # not of a text-only model
        part = _shard_vision(part, batch, input_rows, slice(rank * patches // size, (rank + 1) * patches // size))
    if mtp_targets is not None:
        mtp_targets = MTPTargets(
            mtp_targets.labels[tokens_here],
            mtp_targets.weights[tokens_here],
            _within(mtp_targets.label_positions, tokens_here),
            mtp_targets.is_end[tokens_here],
        )
    return part, weights[tokens_here], mtp_targets


def _shard_vision(part: PackedBatch, batch: PackedBatch, input_rows: slice, patches: slice) -> PackedBatch:
    assert batch.vision and batch.vision_index is not None and batch.vision_token is not None  # by the collator
    is_here = (batch.vision_token >= input_rows.start) & (batch.vision_token < input_rows.stop)
    corner, weight = batch.vision.corner[:, patches], batch.vision.corner_weight[:, patches]
    return dataclasses.replace(
        part,
        vision_index=_pad_rows(batch.vision_index, input_rows, -1),
        vision_token=torch.where(is_here, batch.vision_token - input_rows.start, -1),
        pixel_values=batch.pixel_values[patches],
        vision=dataclasses.replace(batch.vision, corner=corner, corner_weight=weight),
    )


def _pad_rows(x: Tensor, rows: slice, beyond: int) -> Tensor:
    """x [T] -> x[rows]; `rows` may include one row past the end of x, which is `beyond`."""
    return torch.cat([x, x.new_full((1,), beyond)])[rows]


def _within(positions: Tensor, tokens: slice) -> Tensor:
    """The positions inside `tokens`, counted from its first token."""
    return positions[(positions >= tokens.start) & (positions < tokens.stop)] - tokens.start


# ── The cores ─────────────────────────────────────────────────────────────────────────────────────


class UlyssesAttention(nn.Module):
    """Runs a plain core on all T tokens of Hq/U heads."""

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup):
        super().__init__()
        self.core, self.group = core, group

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *inputs: Any, **options: Any) -> Tensor:
        """q [T/U, Hq, D]; k, v [T/U, Hkv, D]; inputs for all T tokens -> [T/U, Hq, D]"""
        repeats = max(1, self.group.size() // k.shape[1])
        if repeats > 1:
            k, v = (x[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2) for x in (k, v))
        q, k, v = (x.unflatten(1, (-1, q.shape[2])) for x in to_heads(self.group, [q], [k], [v]))
        return to_tokens(self.group, self.core(q, k, v, *inputs, **options))


class UlyssesDeltaNet(nn.Module):
    """Runs a plain core on all T tokens of Hk/U key and Hv/U value heads."""

    def __init__(self, core: DeltaNetCore, group: dist.ProcessGroup):
        super().__init__()
        self.core, self.group = core, group
        self.full_split = core.split
        core.split = [width // group.size() for width in self.full_split]

    def forward(self, qkv: Tensor, g: Tensor, beta: Tensor, conv_weight: Tensor, *inputs: Any) -> Tensor:
        """qkv [T/U, C], g, beta [T/U, Hv] fp32, conv_weight [C, K] -> [T/U, Hv, Dv]"""
        rank = self.group.rank()
        parts = zip(conv_weight.split(self.full_split), self.core.split, strict=True)
        channel_weights = [x[rank * n : (rank + 1) * n] for x, n in parts]
        qkv, g, beta = to_heads(self.group, qkv.split(self.full_split, dim=1), [g], [beta])
        return to_tokens(self.group, self.core(qkv, g, beta, torch.cat(channel_weights), *inputs))


class OverGroup(nn.Module):
    """A collective of `qwen35.parallel.collectives` as a module."""

    def __init__(self, collective: type[torch.autograd.Function], group: dist.ProcessGroup):
        super().__init__()
        self.collective, self.group = collective, group

    def forward(self, x: Tensor) -> Tensor:
        return self.collective.apply(self.group, x)
