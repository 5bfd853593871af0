"""Freezing by name, the groups, the optimizer that holds exactly what is trained."""

import pytest
import torch
from peer import config_dict, pair, sample

from qwen35.config.load import SettingError
from qwen35.config.schema import TrainingSettings
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import LoraSpec, add_adapters
from qwen35.training.optimizer import make_optimizer
from qwen35.training.parameter_groups import (
    by_group,
    check_new_tokens,
    check_visuals,
    count,
    freeze,
    group_of,
    parameter_table,
)


def build() -> Qwen35:
    return Qwen35.from_config(config_dict())


@pytest.mark.parametrize("star", ["*", "{*}"])
def test_a_star_matches_one_level(star):
    model = build()
    freeze(model, [f"model.language_model.layers.{star}.mlp", "model.visual"])
    for name, p in model.named_parameters():
        assert p.requires_grad == (".mlp." not in name and "visual" not in name), name


def test_names_match_whole_levels():
    model = build()
    freeze(model, ["model.language_model.layers.1"])
    frozen = {n.split(".")[3] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"1"}


@pytest.mark.parametrize(
    "pattern", ["visual", "model.visul", "model.visual.blocks.9", "model.language_model.layers.{*}.conv"]
)
def test_a_name_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(
        SettingError, match=r"matches no module; there are model, model\.visual, model\.language_model, lm_head"
    ):
        freeze(build(), [pattern])


def test_freezing_everything_is_an_error():
    with pytest.raises(SettingError, match="leave nothing to train"):
        freeze(build(), ["model", "lm_head"])


def test_a_tower_without_images_is_told_or_refused():
    """A step without images skips it: a run of nothing but the tower would train nothing."""
    model = build()
    assert check_visuals(model, visuals=1) == []
    (line,) = check_visuals(model, visuals=0)
    assert line == "the data has no images or videos: what is trained of the vision tower stays as it is"
    freeze(model, ["model.language_model", "lm_head"])
    assert check_visuals(model, visuals=1) == []
    with pytest.raises(SettingError, match="no images or videos, and only the vision tower is trained"):
        check_visuals(model, visuals=0)
    model = build()
    freeze(model, ["model.visual"])
    assert check_visuals(model, visuals=0) == []


def test_new_tokens_that_cannot_be_learnt_are_told():
    model, names = build(), ["<|sep|>", "<plain>"]
    assert check_new_tokens(model, names) == []
    freeze(model, ["lm_head"])
    (line,) = check_new_tokens(model, names)
    assert line.startswith(
        "the data has <|sep|>, <plain>, not of the family's own tokens, and the head, frozen here, hold"
    )
    assert check_new_tokens(model, []) == []
    model = build()
    add_adapters(model, LoraSpec(8, 16.0, ("q_proj",), (), (), 8, False))
    (line,) = check_new_tokens(model, [f"<{i}>" for i in range(9)])
    assert "<4> and 4 more, not of" in line and "the embedding and the head, frozen here" in line


def test_groups_cover_every_parameter_once():
    model = Qwen35(load_config(config_dict()), mtp=True)
    groups = by_group(model.named_parameters())
    assert sum(len(ps) for ps in groups.values()) == len(list(model.parameters()))
    assert group_of("model.language_model.layers.0.mlp.gate.weight") == "mlp.gate"
    assert group_of("model.language_model.layers.0.mlp.experts.gate_up_proj") == "experts"
    assert group_of("model.language_model.layers.0.mlp.shared_expert_gate.weight") == "shared_expert"
    assert group_of("model.language_model.layers.0.linear_attn.norm.weight") == "linear_attn"
    assert group_of("model.language_model.norm.weight") == "norm"


def test_the_table_counts_trained_and_frozen():
    model = build()
    freeze(model, ["model.visual"])
    total = sum(p.numel() for p in model.parameters())
    last = parameter_table(model).splitlines()[-1].split()
    frozen = count(model.model.visual.parameters(), trained=False)
    assert [int(x.replace(",", "")) for x in last[1:]] == [total, total - frozen, frozen]


def test_frozen_parameters_stay_and_have_no_state():
    model, _ = pair(config_dict())
    freeze(model, ["model.visual", "model.language_model.embed_tokens"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, TrainingSettings(train_iters=1, save="x", lr=1e-2, weight_decay=0.1))
    s = sample([20, (4, 4), 5])
    model.loss(s, torch.ones(len(s.labels)) / 20)[0].backward()
    optimizer.step()
    held = {id(p) for p in optimizer.state}
    for name, p in model.named_parameters():
        assert (id(p) in held) == p.requires_grad, name
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def test_only_matrices_decay():
    optimizer = make_optimizer(build(), TrainingSettings(train_iters=1, save="x", weight_decay=0.1))
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.1) for p in group["params"])
