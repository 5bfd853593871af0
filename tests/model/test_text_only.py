"""Text-only checkpoints: flat configs, and a model that has no vision tower at all."""

import copy
import json

import pytest
import torch
from checkpoint_cases import CONFIGS
from peer import config_dict, sample, text_only

from qwen35.batch import derive
from qwen35.model import ConfigError, Qwen35, load_config
from qwen35.model.config_keys import unknown_keys
from qwen35.training.flops import Flops

PUBLISHED = sorted(path.name for path in CONFIGS.glob("*.json"))
FLAGSHIP = CONFIGS / "reconstructed/2.4T-A95B.json"


def published(name: str) -> dict:
    config = json.loads((CONFIGS / name).read_text())
    return text_only(config) | {"tie_word_embeddings": config["tie_word_embeddings"]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_language_models_of_published_sizes_load_flat(name, tmp_path):
    from transformers import AutoConfig

    config, whole = published(name), load_config(CONFIGS / name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    for one in (config, json.loads((tmp_path / "saved/config.json").read_text())):
        assert unknown_keys(one) == []
        found = load_config(one)
        assert found.text == whole.text and found.tie_word_embeddings == whole.tie_word_embeddings
        assert found.vision is found.vision_spec is found.image_token_id is found.video_token_id is None


def test_the_flagship_builds_on_the_meta_device():
    """Its config.json was not seen; the bytes of its bf16 weights are known."""
    config = json.loads(FLAGSHIP.read_text())
    assert unknown_keys(config) == []
    with torch.device("meta"):
        model = Qwen35(load_config(config), mtp=True)
    assert 2 * sum(p.numel() for p in model.parameters()) == 4_892_365_451_008
    assert [layer.is_attention for layer in model.model.language_model.layers].count(True) == 23


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_there_is_no_tower(moe):
    model = Qwen35.from_config(text_only(config_dict(moe=moe)), mtp=True)
    assert model.model.visual is None
    assert not any("visual" in name for name, _ in [*model.named_parameters(), *model.named_modules()])
    whole = Qwen35.from_config(config_dict(moe=moe), mtp=True)
    names = [name for name, _ in whole.named_parameters() if "visual" not in name]
    assert [name for name, _ in model.named_parameters()] == names
    for how in (True, False, "selective"):
        model.recompute(how)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_it_needs_the_flops_of_the_whole_model_without_images(moe):
    with torch.device("meta"):
        models = [Qwen35(load_config(config), mtp=True) for config in (config_dict(moe), text_only(config_dict(moe)))]
    nothing = torch.zeros(0, 3, dtype=torch.int64)
    whole, alone = (Flops(model).of(10, torch.tensor([6, 4]), 5, nothing, 3) for model in models)
    assert whole == alone > 0


def test_it_takes_no_images():
    batch = sample([5, (4, 6), 9])
    with pytest.raises(ValueError, match="1 images or videos for a text-only model"):
        derive(batch, None)
    text = sample([7])
    assert derive(text, None) is text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen3_next"}, "model_type 'qwen3_next' is not one of qwen3_5, qwen3_5_moe, qwen3_5_text"),
        ({"head_dim": None}, "head_dim is None, not a valid integer"),
        ({"num_experts": None}, "num_experts is None, not a valid integer"),
        ({"num_experts": 0}, "lacks num_experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above num_experts 8"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, but layer_types has 4 layers"),
        ({"attn_output_gate": False}, "attn_output_gate is False; this model does True only"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'; this model does 'swish' only"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False; this model does True only"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings is True; this model does False only"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
        ({"vision_config": {"depth": 2}}, "vision_config is {'depth': 2}, a key that is not known"),
        ({"text_config": {"head_dim": 2}}, "text_config is {'head_dim': 2}, a key that is not known"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, a key that is not known"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config says that the weights are quantized"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_parameters.rope_type is 'linear'; this model does 'default'",
        ),
        ({"rope_parameters": {"mrope_interleaved": False}}, "rope_parameters.mrope_interleaved is False; this model"),
        ({"rope_parameters": {"mrope_section": [2, 1, 2]}}, "rope_parameters: mrope_section [2, 1, 2] must add up"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta is 'x', not "),
    ],
)
def test_what_is_refused_is_named_as_the_flat_config_has_it(change, words):
    with pytest.raises(ConfigError) as caught:
        load_config(text_only(config_dict()) | change)
    assert str(caught.value).startswith(words) and len(str(caught.value)) < 300


def test_language_model_only_says_nothing_new_of_a_flat_config():
    config = text_only(config_dict())
    assert load_config(config | {"language_model_only": True}) == load_config(config)


@pytest.mark.parametrize("tied", [None, False, True])
def test_the_head_is_tied_where_transformers_ties_it(tied):
    from transformers.models import qwen3_5

    config = text_only(config_dict(moe=False))
    del config["tie_word_embeddings"]
    if tied is not None:
        config["tie_word_embeddings"] = tied
    theirs = qwen3_5.Qwen3_5ForCausalLM(qwen3_5.Qwen3_5TextConfig(**copy.deepcopy(config)))
    assert load_config(config).tie_word_embeddings == (theirs.lm_head.weight is theirs.model.embed_tokens.weight)
