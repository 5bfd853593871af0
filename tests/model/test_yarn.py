"""YaRN: the frequencies, cos and sin of transformers, from every form of its keys."""

import copy
import json

import pytest
import torch
from checkpoint_cases import CONFIGS
from packaging.version import Version
from peer import config_dict, text_only

from qwen35.model import ConfigError, load_config
from qwen35.model.config import differences
from qwen35.model.rope import text_rope, yarn_frequencies

SECTION = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
BASE = {**SECTION, "rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0, "original_max_position_embeddings": 4096}
FORMS = [
    {"rope_parameters": BASE},
    {"rope_parameters": {"type" if k == "rope_type" else k: v for k, v in BASE.items()}},
    {"rope_parameters": {**BASE, "type": "default"}},
    {"rope_parameters": {**BASE, "factor": 1.0}},
    {"rope_parameters": {**BASE, "factor": 32, "original_max_position_embeddings": 128}},
    {"rope_parameters": {**BASE, "factor": None}, "max_position_embeddings": 16384},
    {"rope_parameters": {k: v for k, v in BASE.items() if k != "original_max_position_embeddings"}},
    {"rope_parameters": BASE, "original_max_position_embeddings": 512},
    {"rope_parameters": {**BASE, "attention_factor": 1.5}},
    {"rope_parameters": {**BASE, "mscale": 0.7, "mscale_all_dim": 1.3}},
    {"rope_parameters": {**BASE, "mscale": 0.7, "mscale_all_dim": 0.0}},
    {"rope_parameters": {**BASE, "beta_fast": 8, "beta_slow": 0.5}},
    {"rope_parameters": {**BASE, "beta_fast": 0, "beta_slow": None}},
    {"rope_parameters": {**BASE, "truncate": False}},
    {"rope_parameters": {**BASE, "truncate": None}},
    {"rope_parameters": {**BASE, "rope_theta": 500.0, "beta_fast": 2.0, "beta_slow": 2.0}},
    {"rope_parameters": {**BASE, "mrope_section": [3, 3, 2], "partial_rotary_factor": 0.5}},
    {"rope_parameters": {**SECTION, "rope_theta": 1e6}, "rope_scaling": BASE},
    {
        "rope_parameters": {**SECTION, "rope_theta": 1e6},
        "rope_scaling": {**SECTION, "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096},
    },
    {"rope_parameters": None, "rope_scaling": {**SECTION, "type": "yarn", "factor": 2.0}, "rope_theta": 3e5},
]


def rope_of(config: dict):
    """transformers' rotary embedding of a config.json."""
    import transformers
    from transformers.models import qwen3_5, qwen3_5_moe

    moe, is_text_only = "moe" in config["model_type"], config["model_type"].endswith("_text")
    module = qwen3_5_moe if moe else qwen3_5
    made = getattr(module, f"Qwen3_5{'Moe' * moe}{'Text' * is_text_only}Config")(**copy.deepcopy(config))
    text, given = (made, config) if is_text_only else (made.text_config, config["text_config"])
    factor = (given.get("rope_parameters") or {}).get("partial_rotary_factor")
    if factor and Version(transformers.__version__) < Version("5.20"):
        text.partial_rotary_factor = factor  # in 5.2 its default is put in the place of the one that is given
    modeling = getattr(module, f"modeling_qwen3_5{'_moe' * moe}")
    return getattr(modeling, f"Qwen3_5{'Moe' * moe}TextRotaryEmbedding")(text)


def compare(config: dict) -> None:
    theirs, ours = rope_of(config), load_config(config).text
    assert ours.yarn is not None
    assert torch.equal(
        yarn_frequencies(ours.rotary_dim, ours.rope_theta, ours.yarn, torch.device("cpu")), theirs.inv_freq
    )
    assert ours.yarn.attention_factor == theirs.attention_scaling
    positions = torch.randint(0, 1 << 20, (3, 64), generator=torch.Generator().manual_seed(0))
    found = text_rope(positions, ours.rotary_dim, ours.rope_theta, ours.mrope_section, ours.yarn)
    wanted = theirs(torch.zeros(1), positions[:, None])
    for mine, both_halves in zip(found, wanted, strict=True):
        assert torch.equal(mine, both_halves[0, :, : mine.shape[1]])


@pytest.mark.parametrize("rope", FORMS, ids=json.dumps)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_every_form_gives_what_transformers_makes_of_it(rope, moe, flat):
    config = config_dict(moe=moe, **rope)
    compare(text_only(config) if flat else config)


@pytest.mark.parametrize("size", ["0.8B", "27B", "35B-A3B"])
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_published_sizes_for_a_million_tokens(size, factor):
    """As the model cards have it: 262,144 tokens and a factor beside the published keys."""
    config = json.loads((CONFIGS / f"{size}.json").read_text())
    length = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 262144}
    config["text_config"]["rope_parameters"] |= length
    compare(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": -4.0}, "text_config.rope_parameters.factor is -4.0, not "),
        ({"factor": "4"}, "text_config.rope_parameters.factor is '4', not "),
        ({"attention_factor": 0.0}, "text_config.rope_parameters.attention_factor is 0.0, not "),
        ({"original_max_position_embeddings": 4096.5}, "original_max_position_embeddings is 4096.5, not "),
        ({"rope_theta": 1.0}, "text_config.rope_parameters: YaRN needs a rope_theta above 1, not 1.0"),
        ({"long_factor": [1.0]}, "text_config.rope_parameters.long_factor is [1.0], a key that is not known"),
        ({"beta_fast": float("nan")}, "text_config.rope_parameters.beta_fast is nan, not "),
    ],
)
def test_values_that_mean_nothing_are_refused(change, words):
    with pytest.raises(ConfigError) as caught:
        load_config(config_dict(rope_parameters=BASE | change))
    assert words in str(caught.value)


def test_yarn_without_a_factor_is_refused():
    rope = {key: value for key, value in BASE.items() if key != "factor"}
    with pytest.raises(ConfigError, match=r"^text_config\.rope_parameters lacks factor$"):
        load_config(config_dict(rope_parameters=rope))


def test_a_checkpoint_of_before_differs_only_from_a_config_with_yarn():
    from dataclasses import asdict

    without, with_yarn = (asdict(load_config(config_dict(**rope))) for rope in ({}, {"rope_parameters": BASE}))
    before = copy.deepcopy(without)
    del before["text"]["yarn"]
    assert differences(before, without) == []
    assert any(found.startswith("text.yarn: None -> ") for found in differences(before, with_yarn))
    assert any(found.startswith("text.yarn: ") for found in differences(with_yarn, without))
