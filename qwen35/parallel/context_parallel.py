"""Context parallelism in the Ulysses way: U ranks share each bin, a part of the tokens each, in the mixers a part of the heads.

All that looks at one token at a time works on T/U tokens, be it a norm, a projection or an expert. Attention and the delta net
look along the sequence: one all-to-all before them gives each rank all T tokens of its heads, one behind them gives the tokens
back. In the vision tower patches are divided in the same way, and its features brought together at its end.
Source: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509.

U must divide the numbers of heads; where it is a multiple of that of KV heads, each of these goes to several ranks.
Every shape follows from the settings, and no exchange waits for the host.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.attention import Prepare
from kernels.recompute_cache import RecomputeCache
from qwen35.batch import MTPTargets, PackedBatch
from qwen35.model import Qwen35
from qwen35.model.attention import Attention, AttentionCore
from qwen35.model.gated_delta_net import DeltaNetCore, GatedDeltaNet
from qwen35.model.vision import VisionAttention
from qwen35.parallel.collectives import gather, sum_over, to_heads, to_tokens
from qwen35.parallel.mesh import Meshes

# ── From outside: the model's cores, and a batch ──────────────────────────────────────────────────


def apply_context_parallel(model: Qwen35, meshes: Meshes) -> None:
    """Have a plain model (not sharded yet) work on parts of batches, as `shard_batch` makes them. No parameter changes."""
    if meshes.ulysses_size == 1:
        return
    group = meshes.tokens["ulysses"].get_group()
    for module in list(model.modules()):
        if isinstance(module, Attention | VisionAttention):
            module.register_module("core", UlyssesAttention(module.core, group))
        elif isinstance(module, GatedDeltaNet):
            module.register_module("core", UlyssesDeltaNet(module.core, group))
    model.model.visual.register_module("all_features", Gathered(group))
    model.register_module("all_stats", Summed(group))


def shard_batch(
    batch: PackedBatch, weights: Tensor, mtp_targets: MTPTargets | None, rank: int, size: int
) -> tuple[PackedBatch, Tensor, MTPTargets | None]:
    """A whole micro-batch on the host, with all derived fields, its token weights [T], and its MTP targets -> a rank's part.

    The part has T/size tokens and P/size patches; `trained` counts from its first token. Whole stay cu_seqlens, position_ids,
    the vision's cu_seqlens and positions, which the mixers alone read, and grid_thw. Where multi-token prediction is trained,
    input_ids and vision_index have one token more, the next part's first, for which nobody need be asked.
    Raises ValueError if tokens or patches do not divide.
    """
    if size == 1:
        return batch, weights, mtp_targets
    assert (
        batch.vision is not None and batch.vision_index is not None and batch.vision_token is not None
    )  # by the collator
    tokens, patches = len(batch.labels), len(batch.pixel_values)
    if tokens % size or patches % size:
        raise ValueError(f"{tokens} tokens and {patches} patches cannot be shared by {size} ranks evenly")
    here = slice(rank * tokens // size, (rank + 1) * tokens // size)
    seen = slice(here.start, here.stop + (mtp_targets is not None))
    is_here = (batch.vision_token >= seen.start) & (batch.vision_token < seen.stop)
    of_tower = slice(rank * patches // size, (rank + 1) * patches // size)
    part = dataclasses.replace(
        batch,
        input_ids=_rows(batch.input_ids, seen, 0),
        labels=batch.labels[here],
        vision_index=_rows(batch.vision_index, seen, -1),
        vision_token=torch.where(is_here, batch.vision_token - seen.start, -1),
        trained=None if batch.trained is None else _inside(batch.trained, here),
        is_pad=None if batch.is_pad is None else batch.is_pad[here],
        pixel_values=batch.pixel_values[of_tower],
        vision=dataclasses.replace(
            batch.vision, corner=batch.vision.corner[:, of_tower], corner_weight=batch.vision.corner_weight[:, of_tower]
        ),
    )
    if mtp_targets is not None:
        mtp_targets = MTPTargets(
            mtp_targets.labels[here],
            mtp_targets.weights[here],
            _inside(mtp_targets.trained, here),
            mtp_targets.is_end[here],
        )
    return part, weights[here], mtp_targets


def _rows(x: Tensor, rows: slice, beyond: int) -> Tensor:
    """x [T] -> those rows; `beyond` for one behind the last."""
    return torch.cat([x, x.new_full((1,), beyond)])[rows]


def _inside(rows: Tensor, here: slice) -> Tensor:
    return rows[(rows >= here.start) & (rows < here.stop)] - here.start


# ── The cores ─────────────────────────────────────────────────────────────────────────────────────


class UlyssesAttention(nn.Module):
    """A plain core that sees all tokens of Hq/U heads."""

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup):
        super().__init__()
        self.core, self.group = core, group

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
        """q [T/U, Hq, D], k, v [T/U, Hkv, D], inputs for all T tokens -> [T/U, Hq, D]"""
        repeats = max(1, self.group.size() // k.shape[1])
        if repeats > 1:
            k, v = (x[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2) for x in (k, v))
        q, k, v = (x.unflatten(1, (-1, q.shape[2])) for x in to_heads(self.group, [q], [k], [v]))
        return to_tokens(self.group, self.core(q, k, v, cu_seqlens, prepare, *inputs, recompute_cache=recompute_cache))


class UlyssesDeltaNet(nn.Module):
    """A plain core that sees all tokens of Hk/U key heads and their Hv/U value heads, through its own channels' taps."""

    def __init__(self, core: DeltaNetCore, group: dist.ProcessGroup):
        super().__init__()
        self.core, self.group = core, group
        self.whole = core.split
        core.split = [width // group.size() for width in self.whole]

    def forward(
        self,
        qkv: Tensor,
        g: Tensor,
        beta: Tensor,
        conv_weight: Tensor,
        cu_seqlens: Tensor,
        recompute_cache: RecomputeCache | None = None,
    ) -> Tensor:
        """qkv [T/U, C], g, beta [T/U, Hv] fp32, conv_weight [C, K] -> [T/U, Hv, Dv]"""
        rank = self.group.rank()
        taps = [
            x[rank * n : (rank + 1) * n] for x, n in zip(conv_weight.split(self.whole), self.core.split, strict=True)
        ]
        qkv, g, beta = to_heads(self.group, qkv.split(self.whole, dim=1), [g], [beta])
        return to_tokens(self.group, self.core(qkv, g, beta, torch.cat(taps), cu_seqlens, recompute_cache))


class Gathered(nn.Module):
    """The features of all patches, of those of a part."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[N/U, H] -> [N, H]"""
        return gather(self.group, x)


class Summed(nn.Module):
    """The routers' stats of all tokens, of those of a part. Each rank sends back what its own part had to do with them."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.group = group

    def forward(self, stats: Tensor) -> Tensor:
        """[2, E] -> [2, E]"""
        return sum_over(self.group, stats)
