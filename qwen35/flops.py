"""Model FLOPs of a packed batch: what the maths needs, forward + backward (= 3 x forward). Recomputation is not counted."""

from torch import Tensor

from qwen35.batch import IGNORE, Ahead, PackedBatch
from qwen35.model.config import ModelConfig

CHUNK = 64  # of the gated delta rule


def token_counts(batch: PackedBatch) -> tuple[int, int, int]:
    """Of a batch on the host: tokens that are not padding, trained ones, image tokens."""
    pad = 0 if batch.is_pad is None else int(batch.is_pad.sum())
    images = 0 if batch.vision_index is None else int((batch.vision_index >= 0).sum())
    return len(batch.input_ids) - pad, int((batch.labels != IGNORE).sum()), images


def batch_flops(config: ModelConfig, batch: PackedBatch, counts: tuple[int, int, int], ahead: Ahead | None) -> float:
    """Of what the batch is for: pad tails and the dummy image are work too, but no use."""
    tokens, trained, image_tokens = counts
    lengths, starts = batch.cu_seqlens.diff(), batch.cu_seqlens[:-1].long()
    if batch.is_pad is not None:
        lengths = lengths[~batch.is_pad[starts]]
    is_real = batch.grid_thw.prod(-1).cumsum(0) <= image_tokens * config.vision.spatial_merge_size**2
    trained += len(ahead.trained) if ahead else 0
    return training_flops(config, tokens, lengths, trained, batch.grid_thw[is_real], mtp=ahead is not None)


def training_flops(
    config: ModelConfig, tokens: int, lengths: Tensor, trained_tokens: int, grid_thw: Tensor, mtp: bool = False
) -> float:
    """FLOPs of one step over sequences of `lengths` [S] tokens; the head is counted where a label is trained.

    mtp: with the layer of multi-token prediction, whose labels are among the trained_tokens.
    """
    t = config.text
    gdn = t.layer_types.count("linear_attention")
    attention = len(t.layer_types) - gdn + mtp
    key, value = t.linear_num_key_heads * t.linear_key_head_dim, t.linear_num_value_heads * t.linear_value_head_dim
    gdn_weights = t.hidden_size * (2 * key + 2 * value + 2 * t.linear_num_value_heads) + value * t.hidden_size
    gdn_weights += (2 * key + value) * t.linear_conv_kernel_dim
    query, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    attention_weights = t.hidden_size * (2 * query + 2 * kv) + query * t.hidden_size
    ffn = 3 * t.hidden_size * t.intermediate_size
    if t.num_experts:
        ffn = 3 * t.hidden_size * (t.num_experts_per_tok * t.moe_intermediate_size + t.shared_expert_intermediate_size)
        ffn += t.hidden_size * (t.num_experts + 1)
    weights = gdn * gdn_weights + attention * attention_weights + (gdn + attention) * ffn
    weights += mtp * 2 * t.hidden_size**2
    dk, dv = t.linear_key_head_dim, t.linear_value_head_dim
    delta_rule = t.linear_num_value_heads * (4 * CHUNK * dk + CHUNK * (dk + dv) + 6 * dk * dv + 2 * CHUNK * dv)
    pairs = float((lengths.double().square() / 2).sum())  # of a query and a key that it sees
    text = tokens * (2 * weights + gdn * delta_rule) + attention * 4 * pairs * query
    head = 2 * trained_tokens * t.hidden_size * t.vocab_size
    return 3 * (text + head + _vision(config, grid_thw))


def _vision(config: ModelConfig, grid_thw: Tensor) -> float:
    v = config.vision
    patches = float(grid_thw.prod(-1).sum())
    pairs = float((grid_thw[:, 0] * (grid_thw[:, 1] * grid_thw[:, 2]) ** 2).sum())
    block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    embed = v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    merged = v.hidden_size * v.spatial_merge_size**2
    merger = (merged**2 + merged * v.out_hidden_size) / v.spatial_merge_size**2
    return 2 * patches * (v.depth * block + embed + merger) + v.depth * 4 * pairs * v.hidden_size
