"""The bytes that rank 0 has to send in a step if nothing is sent twice, by (kind of collective, name of the group).

FSDP: every sharded parameter gathered once for forward and once for backward in the type of the arithmetic (the embedding, the
last norm and the head once: they stay), its gradient scattered once in fp32. Experts: the rows of top-k choices to their
ranks and back, and the same for the gradients. Ulysses: what enters and leaves each mixer, and the same for the gradients.
What recomputation sends again is not among it.
"""

from torch.distributed.tensor import DTensor

from qwen35.config.schema import Settings
from qwen35.model import Qwen35
from qwen35.model.config import TextConfig
from qwen35.parallel.mesh import Meshes
from qwen35.train import DTYPES
from rehearse.communication import NAMES

Bytes = dict[tuple[str, str], float]
UNITS = ("model.visual.", "model.language_model.layers.", "mtp.")  # what does not stay gathered after forward


def least(model: Qwen35, meshes: Meshes, settings: Settings, patches: int) -> Bytes:
    """Of a sharded model, for micro-batches with so many patches."""
    found: Bytes = {}
    narrow = DTYPES[settings.training.dtype].itemsize
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            split = "ep" in (p.device_mesh.mesh_dim_names or ())
            dim, part = ("fsdp", meshes.experts["ep"].size()) if split else ("shard", 1)
            ranks = meshes.experts["fsdp"].size() if split else meshes.weights["shard"].size()
            sent = p.numel() / part * (ranks - 1) / ranks  # without what pads the shards to one size
            _add(found, "all-gather", NAMES[dim], sent * narrow * (1 + name.startswith(UNITS)))
            if p.requires_grad:
                _add(found, "reduce-scatter", NAMES[dim], sent * 4)
    text = model.config.text
    ulysses, ep = meshes.ulysses_size, meshes.experts["ep"].size()
    basic = settings.data.dataset_param.basic_parameters
    tokens = settings.training.micro_batch_size * basic.cutoff_len // ulysses  # of a rank and micro-batch
    mtp = bool(settings.model.mtp_num_layers)
    if ep > 1:
        layers = len(text.layer_types) + mtp
        row = layers * tokens * text.hidden_size * narrow
        if ep < text.num_experts_per_tok:  # cheaper: all tokens to all ranks, and a share from each
            _add(found, "all-gather", NAMES["ep"], 2 * row * (ep - 1))
            _add(found, "all-to-all", NAMES["ep"], 2 * row * (ep - 1))
        else:
            _add(found, "all-to-all", NAMES["ep"], 4 * row * text.num_experts_per_tok * (ep - 1) / ep)
    if ulysses > 1:
        width = _mixers(text, ulysses, narrow, mtp) * tokens
        width += model.config.vision.depth * 4 * model.config.vision.hidden_size * narrow * patches / ulysses
        _add(found, "all-to-all", NAMES["ulysses"], 2 * width * (ulysses - 1) / ulysses)
    return {key: value * settings.training.gradient_accumulation_steps for key, value in found.items()}


def _mixers(t: TextConfig, ulysses: int, narrow: int, mtp: bool) -> float:
    """Bytes of one token through all mixers, in and out."""
    deltas = t.layer_types.count("linear_attention")
    heads = 2 * t.num_attention_heads + 2 * max(t.num_key_value_heads, ulysses)
    value = t.linear_num_value_heads * t.linear_value_head_dim
    delta = (2 * t.linear_num_key_heads * t.linear_key_head_dim + 2 * value) * narrow + 2 * t.linear_num_value_heads * 4
    return (len(t.layer_types) - deltas + mtp) * heads * t.head_dim * narrow + deltas * delta


def _add(found: Bytes, kind: str, group: str, count: float) -> None:
    found[kind, group] = found.get((kind, group), 0.0) + count
