"""The least that rank 0 must send in a step, in bytes, by (kind of collective, name of the group).

FSDP gathers every sharded parameter once for forward and once for backward in the training dtype
(the embedding, the last norm and the head once, since they stay gathered), and reduce-scatters its
gradient once in fp32. Expert parallelism sends the rows of the top-k choices to their ranks and
back, Ulysses what enters and leaves each mixer; both send the gradients of the same. What
recomputation sends again is left out.
"""

from collections import defaultdict

from torch.distributed.tensor import DTensor

from qwen35.config.schema import Settings
from qwen35.model import Qwen35
from qwen35.model.config import TextConfig
from qwen35.parallel.mesh import Meshes
from qwen35.train import DTYPES
from rehearse.communication import NAMES

Bytes = dict[tuple[str, str], float]
RESHARDED = ("model.visual.", "model.language_model.layers.", "mtp.")  # after forward


def lower_bound(model: Qwen35, meshes: Meshes, settings: Settings, patches: int) -> Bytes:
    """For a sharded model and micro-batches of `patches` image patches."""
    found: Bytes = defaultdict(float)
    itemsize = DTYPES[settings.training.dtype].itemsize
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            is_expert = "ep" in (p.device_mesh.mesh_dim_names or ())
            dim, parts = ("fsdp", meshes.experts["ep"].size()) if is_expert else ("shard", 1)
            ranks = meshes.experts["fsdp"].size() if is_expert else meshes.weights["shard"].size()
            sent = p.numel() / parts * (ranks - 1) / ranks  # without the padding of shards to one size
            found["all-gather", NAMES[dim]] += sent * itemsize * (1 + name.startswith(RESHARDED))
            if p.requires_grad:
                found["reduce-scatter", NAMES[dim]] += sent * 4
    text = model.config.text
    ulysses, ep = meshes.ulysses_size, meshes.experts["ep"].size()
    basic = settings.data.dataset_param.basic_parameters
    tokens = settings.training.micro_batch_size * basic.cutoff_len // ulysses  # of a rank and micro-batch
    mtp = bool(settings.model.mtp_num_layers)
    if ep > 1:
        row = (len(text.layer_types) + mtp) * tokens * text.hidden_size * itemsize
        if ep <= text.num_experts_per_tok:  # not dearer: all tokens to all ranks, and a partial sum from each
            found["all-gather", NAMES["ep"]] += 2 * row * (ep - 1)
            found["all-to-all", NAMES["ep"]] += 2 * row * (ep - 1)
        else:
            found["all-to-all", NAMES["ep"]] += 4 * row * text.num_experts_per_tok * (ep - 1) / ep
    if ulysses > 1:
        width = mixer_bytes(text, ulysses, itemsize, mtp) * tokens
        if vision := model.config.vision:
            width += vision.depth * 4 * vision.hidden_size * itemsize * patches / ulysses
        found["all-to-all", NAMES["ulysses"]] += 2 * width * (ulysses - 1) / ulysses
    return {key: value * settings.training.gradient_accumulation_steps for key, value in found.items()}


def mixer_bytes(t: TextConfig, ulysses: int, itemsize: int, mtp: bool) -> float:
    """Bytes of one token that enter and leave all mixers."""
    deltas = t.layer_types.count("linear_attention")
    heads = 2 * t.num_attention_heads + 2 * max(t.num_key_value_heads, ulysses)
    value = t.linear_num_value_heads * t.linear_value_head_dim
    key = t.linear_num_key_heads * t.linear_key_head_dim
    delta = (2 * key + 2 * value) * itemsize + 2 * t.linear_num_value_heads * 4
    return (len(t.layer_types) - deltas + mtp) * heads * t.head_dim * itemsize + deltas * delta
