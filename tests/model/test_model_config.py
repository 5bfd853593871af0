"""Each key of config.json is used, harmless, refused or reported, as transformers reads it."""

import copy
import json
import time

import pytest
import torch
from checkpoint_cases import CONFIGS
from peer import config_dict, pair, peer_inputs, sample
from test_model import IMAGES, compare

from qwen35.model import ConfigError, load_config
from qwen35.model.config_keys import HARMLESS, HARMLESS_KEYS, ONLY_VALUE, REFUSED, USED, unknown_keys
from qwen35.model.rope import inverse_frequencies

PUBLISHED = sorted(path.name for path in CONFIGS.glob("*.json"))
OF_3_8 = {  # keys of Qwen3.8-27B's config that Qwen3.5-27B's lacks
    "bos_token_id": 248044,
    "pad_token_id": None,
    "output_gate_type": "swish",
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
}


def with_key(where: str, value: object, config: dict | None = None) -> dict:
    """A small config with a dotted key set."""
    config = copy.deepcopy(config or config_dict())
    *above, key = where.split(".")
    section = config
    for name in above:
        section = section.setdefault(name, {})
    section[key] = value
    return config


def transformers_configs():
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig

    return Qwen3_5Config, Qwen3_5MoeConfig


def class_of(config: dict):
    return transformers_configs()[config["model_type"] == "qwen3_5_moe"]


# -- what loads without a word ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_load_as_stored_and_as_saved_by_transformers(name, tmp_path):
    config = json.loads((CONFIGS / name).read_text())
    theirs = class_of(config)(**copy.deepcopy(config))
    theirs.save_pretrained(tmp_path)
    for one in (config, json.loads(json.dumps(theirs.to_dict())), json.loads((tmp_path / "config.json").read_text())):
        assert unknown_keys(one) == []
        assert load_config(one) == load_config(config)


def test_the_keys_of_qwen3_8():
    config = json.loads((CONFIGS / "27B.json").read_text())
    newer = copy.deepcopy(config) | {"language_model_only": False}
    newer["text_config"] |= OF_3_8
    del newer["text_config"]["mlp_only_layers"]
    assert unknown_keys(newer) == []
    assert load_config(newer) == load_config(config)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_the_keys_of_qwen3_8_mean_the_same_to_transformers(moe):
    """Logits and all gradients of a small model with them."""
    newer = config_dict(moe=moe) | {"language_model_only": False}
    newer["text_config"] |= OF_3_8
    compare(newer, IMAGES)


@pytest.mark.parametrize("moe", [False, True])
def test_defaults_saved_by_transformers_load(moe, tmp_path):
    cls = transformers_configs()[moe]
    theirs = cls(vision_config={"out_hidden_size": cls().text_config.hidden_size})
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for config in (json.loads(json.dumps(theirs.to_dict())), saved):
        assert unknown_keys(config) == []
        ours = load_config(config)
        assert ours.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
        assert ours.text.layer_types == tuple(theirs.text_config.layer_types)


def test_keys_of_every_transformers_model_are_harmless():
    from transformers import GenerationConfig, PreTrainedConfig

    general = set(PreTrainedConfig().to_dict()) | set(GenerationConfig().to_dict())
    config = config_dict()
    for section in (config, config["text_config"], config["vision_config"]):
        section |= dict.fromkeys(general & HARMLESS_KEYS, 7)
    assert unknown_keys(config) == []
    assert load_config(config) == load_config(config_dict())
    assert set(PreTrainedConfig().to_dict()) - HARMLESS_KEYS <= {"model_type", "is_encoder_decoder"}


def test_a_key_is_in_one_table():
    assert all(HARMLESS)
    for where, only in ONLY_VALUE.items():
        used = set(USED[where].split())
        for table in (set(only), set(REFUSED)):
            assert not table & used and not table & HARMLESS_KEYS


# -- rope ------------------------------------------------------------------------------------------

SECTION = {"mrope_section": [2, 1, 1]}
WIDE = {"mrope_section": [3, 3, 2]}
ROPES = [
    {"rope_parameters": SECTION},
    {"rope_parameters": {**SECTION, "rope_type": "default", "rope_theta": 5e5}},
    {"rope_parameters": {**SECTION, "type": "default", "rope_theta": 5000}},
    {"rope_parameters": SECTION, "rope_theta": 5e5},
    {"rope_parameters": {**SECTION, "rope_theta": 100.0}, "rope_theta": 5e5},
    {"rope_parameters": WIDE, "partial_rotary_factor": 0.5},
    {"rope_parameters": {**SECTION, "partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.5},
    {"rope_parameters": {**WIDE, "partial_rotary_factor": 0.5, "rope_theta": 300.0}, "partial_rotary_factor": 0.25},
    {"rope_parameters": None, "rope_scaling": SECTION},
    {"rope_parameters": None, "rope_scaling": SECTION, "rope_theta": 5e5},
    {"rope_parameters": {**SECTION, "rope_theta": 5e5}, "rope_scaling": {}},
    {"rope_parameters": {**SECTION, "rope_theta": 5e5}, "rope_scaling": None},
    {"rope_parameters": {**SECTION, "rope_theta": 5e5}, "rope_scaling": {**SECTION, "rope_type": "default"}},
    {
        "rope_parameters": {**SECTION, "rope_theta": 5e5},
        "rope_scaling": {**SECTION, "rope_theta": 7e3},
        "rope_theta": 9,
    },
    {"rope_parameters": SECTION, "rope_scaling": {**WIDE, "type": "default", "partial_rotary_factor": 0.5}},
]


@pytest.mark.parametrize("rope", ROPES, ids=json.dumps)
@pytest.mark.parametrize("moe", [False, True])
def test_rope_is_read_as_transformers_reads_it(moe, rope):
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

    config = config_dict(moe=moe, **rope)
    embedding = Qwen3_5MoeTextRotaryEmbedding if moe else Qwen3_5TextRotaryEmbedding
    theirs = embedding(class_of(config)(**copy.deepcopy(config)).text_config)
    ours = load_config(config).text
    assert torch.equal(inverse_frequencies(ours.rotary_dim, ours.rope_theta, torch.device("cpu")), theirs.inv_freq)
    assert list(ours.mrope_section) == list(theirs.mrope_section)


@pytest.mark.parametrize("rope", [ROPES[3], ROPES[5], ROPES[12]], ids=json.dumps)
def test_the_logits_are_those_of_transformers_with_rope_beside_rope_parameters(rope):
    ours, theirs = pair(config_dict(**rope))
    record = sample([5, (4, 6), 9])
    with torch.no_grad():
        inputs = peer_inputs(record)
        try:
            expected = theirs(**inputs).logits[0]
        except TypeError:  # releases before 5.3 derive the token types themselves
            inputs.pop("mm_token_type_ids")
            expected = theirs(**inputs).logits[0]
        torch.testing.assert_close(ours.logits(record), expected, rtol=1e-4, atol=1e-5)


def test_vision_rope_equals_every_transformers_release():
    for rope in ({"rope_type": "axial", "rope_theta": 10000.0}, {"rope_type": "default"}, {}):
        config = with_key("vision_config.rope_parameters", rope)
        assert load_config(config) == load_config(config_dict())
        theirs = class_of(config)(**copy.deepcopy(config)).vision_config
        assert (getattr(theirs, "rope_parameters", None) or {}).get("rope_theta", 10000.0) == 10000.0


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("where", ["", "text_config.", "vision_config."])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "longrope", "mrope"])
def test_other_ropes_are_refused_by_name(where, name, key, kind):
    config = with_key(f"{where}{name}", {**YARN, "type": "default", "rope_type": "default", key: kind})
    built = "'axial'" if where == "vision_config." else "'default' or 'yarn'"
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    said = f"{where}{name}.{key} is '{kind}'; this model does {built} only; bring a checkpoint that has it so"
    assert str(caught.value) == said


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_yarn_where_it_is_not_read_is_refused(name):
    with pytest.raises(ConfigError, match=f"^{name} is .* at the top level, where it is not read"):
        load_config(with_key(name, YARN))
    with pytest.raises(ConfigError, match=f"^vision_config.{name}.type is 'yarn'; this model does 'axial' only"):
        load_config(with_key(f"vision_config.{name}", YARN))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("text_config.attn_output_gate", False, "this model does True only; bring a checkpoint that has it so"),
        ("text_config.output_gate_type", "sigmoid", "this model does 'swish' only"),
        ("text_config.norm_topk_prob", False, "this model does True only"),
        ("text_config.rope_parameters.mrope_interleaved", False, "this model does True only"),
        ("text_config.rope_parameters.factor", 4.0, "may change what is computed"),
        ("text_config.rope_parameters.full_attention", {"rope_type": "default"}, "may change what is computed"),
        ("text_config.rope_parameters", [1], "not an object"),
        ("text_config.mtp_use_dedicated_embeddings", True, "this model does False only"),
        ("text_config.attention_bias", True, "this model does False only"),
        ("text_config.attention_dropout", 0.1, "this model does 0.0 only; set it to 0.0"),
        ("text_config.mlp_only_layers", [1], "this model does [] only"),
        ("text_config.use_sliding_window", True, "this model does False only"),
        ("text_config.sliding_window", 4096, "may change what is computed"),
        ("text_config.final_logit_softcapping", 30.0, "may change what is computed"),
        ("text_config.query_pre_attn_scalar", 144, "may change what is computed"),
        ("text_config.use_qk_norm", False, "may change what is computed"),
        ("text_config.lora_rank", 8, "may change what is computed"),
        ("text_config.residual_multiplier", 0.2, "may change what is computed"),
        ("text_config.zero_centered_rmsnorm", False, "may change what is computed"),
        ("text_config.scoring_func", "sigmoid", "may change what is computed"),
        ("text_config.n_group", 4, "may change what is computed"),
        ("text_config.first_k_dense_replace", 1, "may change what is computed"),
        ("text_config.use_adapter", True, "may change what is computed"),
        ("text_config.model_type", "qwen3_next", "this model does 'qwen3_5_text' only"),
        ("text_config.per_layer_config", {"0": {}}, "layers that differ"),
        ("text_config.tie_word_embeddings", "yes", "not true or false"),
        ("vision_config.deepstack_visual_indexes", [1], "this model does [] only"),
        ("vision_config.rope_parameters.rope_theta", 5e5, "this model does 10000 only"),
        ("vision_config.rope_theta", 5e5, "this model does 10000 only"),
        ("vision_config.num_attention_heads", 4, "may change what is computed"),
        ("vision_config.window_size", 112, "may change what is computed"),
        ("vision_config.use_bias", True, "may change what is computed"),
        ("language_model_only", True, "this model does False only; a model without a vision tower is of model_type"),
        ("audio_config", {"depth": 2}, "may change what is computed"),
        ("auto_map", {"AutoModel": "modeling.Mine"}, "code of its own"),
        ("transformers_weights", "other.safetensors", "another file of weights"),
        ("rope_theta", 5e5, "at the top level, where it is not read, but None in text_config"),
        ("hidden_size", 64, "at the top level, where it is not read, but 48 in text_config"),
        ("rope_scaling", {"rope_type": "default"}, "at the top level, where it is not read"),
    ],
)
def test_keys_that_change_the_computation_are_refused_by_name(key, value, words):
    with pytest.raises(ConfigError) as caught:
        load_config(with_key(key, value))
    assert str(caught.value).startswith(f"{key} is "), caught.value
    assert words in str(caught.value) and len(str(caught.value)) < 300


def test_the_message_about_a_long_key_is_short():
    (told,) = unknown_keys(with_key(f"text_config.{'note' * 10_000}", "y" * 100_000))
    assert told.startswith("text_config.") and len(told) < 100
    with pytest.raises(ConfigError) as caught:
        load_config(with_key(f"text_config.{'x_scale' * 10_000}", "y" * 100_000))
    assert str(caught.value).startswith("text_config.") and len(str(caught.value)) < 300


def test_the_top_level_may_repeat_text_config():
    assert unknown_keys(with_key("hidden_size", 48)) == []


def test_unknown_keys_are_reported_and_null_counts_as_absent():
    config = with_key("vision_config.note", "mine", with_key("text_config.license", "MIT", with_key("author", 3)))
    config["text_config"] |= {"sliding_window": None, "final_logit_softcapping": None}
    config["a\nb"] = 1
    assert unknown_keys(config) == ["author", "'a\\nb'", "text_config.license", "vision_config.note"]
    assert load_config(config) == load_config(config_dict())


@pytest.mark.parametrize(
    ("value", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
        ({"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": ["x"] * 10_000}, "'gptq'"),
        ({"quant_algo": "NVFP4"}, "'NVFP4'"),
        ({}, "method unknown"),
        ("int8", "method unknown"),
    ],
)
@pytest.mark.parametrize("where", ["", "text_config.", "vision_config."])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_weights_are_reported_first(key, where, value, method):
    config = with_key(f"{where}{key}", value) | {"model_type": "other"}
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    message = str(caught.value)
    assert message.startswith(f"{where}{key} says that the weights are quantized") and method in message
    assert "bring the bf16 checkpoint" in message and len(message) < 250


# -- tied weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [None, False, True])
@pytest.mark.parametrize("top", [None, False, True])
def test_the_head_is_tied_where_transformers_ties_it(top, inside):
    from transformers.models import qwen3_5

    config = config_dict(moe=False)
    for section, value in ((config, top), (config["text_config"], inside)):
        del section["tie_word_embeddings"]
        if value is not None:
            section["tie_word_embeddings"] = value
    theirs = qwen3_5.Qwen3_5ForConditionalGeneration(class_of(config)(**copy.deepcopy(config)))
    is_tied = theirs.lm_head.weight is theirs.model.language_model.embed_tokens.weight
    assert load_config(config).tie_word_embeddings == is_tied


# -- what is too much ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 1_000_000])
def test_too_many_layers_are_refused_at_once(count):
    config = with_key("text_config.layer_types", ["linear_attention"] * 1_000_000)
    config["text_config"]["num_hidden_layers"] = count
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match="num_hidden_layers is") as caught:
        load_config(config)
    assert time.perf_counter() - begin < 5 and len(str(caught.value)) < 300
