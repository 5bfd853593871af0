"""Freezing by name, the groups, the optimizer that holds exactly what is trained."""

import pytest
import torch
from peer import config_dict, random_model, sample

from qwen35.config.load import SettingError
from qwen35.config.schema import TrainingSettings
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import LoraSpec, add_adapters
from qwen35.training.optimizer import group_table, make_optimizer, prepare_step
from qwen35.training.parameter_groups import (
    by_group,
    check_new_tokens,
    check_visuals,
    chosen_patterns,
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
    model = random_model(config_dict())
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


RATES = {"model.visual": 0.1, "model.visual.merger": 3.0, "model.language_model.layers.*.mlp.gate": 0.5, "lm_head": 2}


def factor(name: str) -> float:
    """What RATES says of a parameter, told by hand."""
    if name.startswith("model.visual."):
        return 3.0 if name.startswith("model.visual.merger.") else 0.1
    return 0.5 if name.endswith(".mlp.gate.weight") else 2.0 if name == "lm_head.weight" else 1.0


@pytest.mark.parametrize("kind", ["adamw", "adamw_swap"])
def test_each_module_learns_at_its_own_rate(kind):
    """As torch's AdamW with a group for each parameter."""
    model, reference = build(), build()
    t = TrainingSettings(
        train_iters=1, save="x", lr=1e-2, weight_decay=0.1, lr_by_module=RATES, optimizer=kind, adam_beta2=0.95
    )
    ours = make_optimizer(model, t)
    theirs = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.1 * (p.ndim > 1), "factor": factor(name)}
            for name, p in reference.named_parameters()
        ],
        betas=(0.9, 0.95),
    )
    assert {factor(name) for name, _ in model.named_parameters()} == {0.1, 3.0, 0.5, 2.0, 1.0}
    for rate in (1e-3, 2e-3):
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        prepare_step(ours, rate, 1, 1, torch.ones(6))
        for group in theirs.param_groups:
            group["lr"] = rate * group["factor"]
        ours.step()
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-8), name


def test_the_table_of_rates():
    model = build()
    optimizer = make_optimizer(model, TrainingSettings(train_iters=1, save="x", weight_decay=0.1, lr_by_module=RATES))
    head, *rows = (line.split() for line in group_table(optimizer, 1e-2).splitlines())
    assert head == "learning rates trained lr weight decay".split()
    numbers: dict[tuple, int] = {}
    for name, p in model.named_parameters():
        key = factor(name), p.ndim > 1
        numbers[key] = numbers.get(key, 0) + p.numel()
    names = {1.0: "others", 2.0: "lm_head", 0.5: "model.language_model.layers.*.mlp.gate"}
    names |= {0.1: "model.visual", 3.0: "model.visual.merger"}
    wanted = [
        [names[f], f"{n:,}", f"{1e-2 * f:.3g}", "0.1" if is_matrix else "0"] for (f, is_matrix), n in numbers.items()
    ]
    assert sorted(rows) == sorted(wanted)
    plain = group_table(make_optimizer(model, TrainingSettings(train_iters=1, save="x")), 1e-2).splitlines()
    assert [line.split() for line in plain[1:]] == [["all", f"{sum(numbers.values()):,}", "0.01", "0"]]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["model.visul"], r"lr_by_module: model\.visul matches no module; there are model, model\.visual, "),
        (["lm_head", "model.visual.blocks"], r"lr_by_module: model\.visual\.blocks matches nothing that is trained"),
        (
            ["model.language_model.norm", "model"],
            r"model\.language_model\.norm: later patterns match all that it does;",
        ),
    ],
)
def test_a_rate_without_effect_is_an_error(patterns, words):
    model = build()
    freeze(model, ["model.visual"])
    with pytest.raises(SettingError, match=words):
        make_optimizer(model, TrainingSettings(train_iters=1, save="x", lr_by_module=dict.fromkeys(patterns, 0.5)))


def test_adapters_have_rates_by_the_modules_they_are_on():
    model = build()
    add_adapters(model, LoraSpec(8, 16.0, ("q_proj", "up_proj"), (), (), 8, False))
    patterns = ["model.language_model.layers.*.self_attn", "model.language_model.layers.*.self_attn.q_proj.lora_B"]
    chosen = chosen_patterns(model, patterns)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".self_attn." in name]
    assert chosen == {name: patterns[name.endswith("lora_B")] for name in trained} and len(trained) >= 2
    with pytest.raises(SettingError, match=r"model\.visual matches nothing that is trained"):
        chosen_patterns(model, ["model.visual"])
