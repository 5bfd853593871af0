"""The table of names, compared with the published checkpoints and inverted."""

import json
import math

import pytest
import torch
from checkpoint_cases import CONFIGS, DATA, published_shapes
from hf_folder import stored_shapes

from qwen35.checkpoint.errors import fold_names
from qwen35.checkpoint.hf_names import mappings_of, published_dtype
from qwen35.checkpoint.slices import TensorSlice, TensorSpec

COUNTS = {row["size"]: row for row in json.loads((DATA / "parameter_counts.json").read_text())}


def published_tensors(config: dict) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors of a published checkpoint from its config.json, written independently."""
    t, v = config["text_config"], config["vision_config"]
    hidden, head, deep = t["hidden_size"], t["head_dim"], v["hidden_size"]
    heads, kv = t["num_attention_heads"], t["num_key_value_heads"]
    nv, dv = t["linear_num_value_heads"], t["linear_value_head_dim"]
    conv = 2 * t["linear_num_key_heads"] * t["linear_key_head_dim"] + nv * dv
    out = {}

    def put(prefix, **shapes):
        for name, shape in shapes.items():
            out[f"{prefix}.{name.replace('__', '.')}"] = (shape, "BF16")

    def attention(prefix):
        put(f"{prefix}.self_attn", q_proj__weight=(2 * heads * head, hidden), k_proj__weight=(kv * head, hidden))
        put(f"{prefix}.self_attn", v_proj__weight=(kv * head, hidden), o_proj__weight=(hidden, heads * head))
        put(f"{prefix}.self_attn", q_norm__weight=(head,), k_norm__weight=(head,))

    def delta_net(prefix):
        prefix += ".linear_attn"
        put(prefix, in_proj_qkv__weight=(conv, hidden), in_proj_z__weight=(nv * dv, hidden), dt_bias=(nv,))
        put(prefix, in_proj_a__weight=(nv, hidden), in_proj_b__weight=(nv, hidden), conv1d__weight=(conv, 1, 4))
        put(prefix, out_proj__weight=(hidden, nv * dv))
        out[f"{prefix}.A_log"], out[f"{prefix}.norm.weight"] = ((nv,), "F32"), ((dv,), "F32")

    def gated(prefix, size):
        put(prefix, gate_proj__weight=(size, hidden), up_proj__weight=(size, hidden), down_proj__weight=(hidden, size))

    def feed_forward(prefix, stacked):
        prefix += ".mlp"
        if "num_experts" not in t:
            gated(prefix, t["intermediate_size"])
            return
        experts, inner = t["num_experts"], t["moe_intermediate_size"]
        put(prefix, gate__weight=(experts, hidden), shared_expert_gate__weight=(1, hidden))
        gated(f"{prefix}.shared_expert", t["shared_expert_intermediate_size"])
        if stacked:
            put(f"{prefix}.experts", gate_up_proj=(experts, 2 * inner, hidden), down_proj=(experts, hidden, inner))
        else:
            for j in range(experts):
                gated(f"{prefix}.experts.{j}", inner)

    def norms(prefix):
        put(prefix, input_layernorm__weight=(hidden,), post_attention_layernorm__weight=(hidden,))

    put("model.language_model", embed_tokens__weight=(t["vocab_size"], hidden), norm__weight=(hidden,))
    for i in range(t["num_hidden_layers"]):
        layer = f"model.language_model.layers.{i}"
        norms(layer)
        (attention if i % 4 == 3 else delta_net)(layer)
        feed_forward(layer, stacked=True)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = ((t["vocab_size"], hidden), "BF16")

    p, wide, merged = v["patch_size"], v["intermediate_size"], 4 * deep
    put("model.visual.patch_embed.proj", weight=(deep, 3, 2, p, p), bias=(deep,))
    put("model.visual.pos_embed", weight=(2304, deep))
    for i in range(v["depth"]):
        block = f"model.visual.blocks.{i}"
        put(block, norm1__weight=(deep,), norm1__bias=(deep,), norm2__weight=(deep,), norm2__bias=(deep,))
        put(f"{block}.attn", qkv__weight=(3 * deep, deep), qkv__bias=(3 * deep,))
        put(f"{block}.attn", proj__weight=(deep, deep), proj__bias=(deep,))
        put(f"{block}.mlp", linear_fc1__weight=(wide, deep), linear_fc1__bias=(wide,))
        put(f"{block}.mlp", linear_fc2__weight=(deep, wide), linear_fc2__bias=(deep,))
    put("model.visual.merger", norm__weight=(deep,), norm__bias=(deep,))
    put("model.visual.merger", linear_fc1__weight=(merged, merged), linear_fc1__bias=(merged,))
    put("model.visual.merger", linear_fc2__weight=(hidden, merged), linear_fc2__bias=(hidden,))

    put("mtp", fc__weight=(hidden, 2 * hidden), norm__weight=(hidden,))
    put("mtp", pre_fc_norm_embedding__weight=(hidden,), pre_fc_norm_hidden__weight=(hidden,))
    norms("mtp.layers.0")
    attention("mtp.layers.0")
    feed_forward("mtp.layers.0", stacked=False)
    return out


@pytest.mark.parametrize("size", COUNTS)
def test_published_checkpoints_have_these_tensors(size):
    """The model on the meta device has the published names, shapes, dtypes, counts and bytes."""
    config = json.loads((CONFIGS / f"{size}.json").read_text())
    spec = {n: TensorSpec(s, published_dtype(n)) for n, s in stored_shapes(published_shapes(size)).items()}
    codes = {torch.bfloat16: "BF16", torch.float32: "F32"}
    assert {name: (s.shape, codes[s.dtype]) for name, s in spec.items()} == published_tensors(config)

    def numel(prefix):
        return sum(math.prod(s.shape) for name, s in spec.items() if name.startswith(prefix))

    counts = COUNTS[size]
    assert len(spec) == counts["tensors"]
    assert sum(s.nbytes for s in spec.values()) == counts["bytes"]
    assert sum(s.dtype == torch.float32 for s in spec.values()) == counts["f32"]
    assert numel("") == counts["total"]
    assert numel("model.visual.") == counts["visual"]
    assert numel("mtp.") == counts["mtp"]
    assert numel("lm_head.") == counts["lm_head"]
    assert numel("model.language_model.") + numel("lm_head.") == counts["language"]


@pytest.mark.parametrize("layout", ["hub", "per_expert", "stacked"])
@pytest.mark.parametrize("size", ["35B-A3B", "9B"])
def test_mappings_are_inverted(size, layout):
    """A mapping turns regions around; mappings cover a tensor; the names tell the layout."""
    shapes = published_shapes(size)
    names = stored_shapes(shapes, layout)
    mapped = {name: mappings_of(name, shape, names) for name, shape in shapes.items()}
    assert {m.disk_name: m.disk_shape for mappings in mapped.values() for m in mappings} == names
    for name, shape in shapes.items():
        found = mapped[name]
        assert sum(mapping.region.numel for mapping in found) == math.prod(shape)
        for mapping in found:
            assert mapping.to_model(TensorSlice.full(mapping.disk_shape)) == mapping.region
            assert mapping.to_disk(mapping.region) == TensorSlice.full(mapping.disk_shape)


def test_long_lists_of_names_are_folded_without_loss():
    names = [f"a.{i}.b.{j}.w" for i in (0, 1, 2, 4) for j in range(3)]
    assert fold_names(names) == ["a.{0-2,4}.b.{0-2}.w"]
    assert fold_names(["a.1.w", "b.norm1.w"]) == ["a.1.w", "b.norm1.w"]
    assert fold_names(names[:-1]) == names[:-1]  # one combination is missing
