"""Settings: paths, overrides, defaults, and messages that name each mistake."""

import pytest
import yaml

from qwen35.config.load import SettingError, from_flat, load_settings, to_yaml
from qwen35.config.schema import DpoSettings, LoraSettings

MINIMAL = {
    "data": {"dataset_param": {"basic_parameters": {"dataset": "a.json"}}},
    "model": {"model_name_or_path": "ckpt"},
    "training": {"train_iters": 10, "save": "runs/x", "init_from_hf_path": "ckpt"},
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_overrides_defaults_and_the_short_form(recipe):
    s = load_settings(recipe, ["training.lr=1e-4", "model.loss_type=per_token_loss", "model.freeze=[model.visual]"])
    assert s.training.lr == 1e-4 and s.training.clip_grad == 1.0
    assert s.model.loss_cfg.loss_type == "per_token_loss" and s.model.freeze == ("model.visual",)
    assert s.tokenizer_dir == "ckpt"


def test_lists_of_names_with_stars(recipe):
    for value in ("[model.layers.{*}.mlp, a.*]", "['model.layers.{*}.mlp', 'a.*']"):
        assert load_settings(recipe, [f"model.freeze={value}"]).model.freeze == ("model.layers.{*}.mlp", "a.*")


def test_a_section_may_be_empty(recipe):
    recipe.write_text(recipe.read_text() + "parallel:\n")
    assert load_settings(recipe).parallel.recompute is False


def test_a_recipe_takes_from_its_base_what_it_does_not_say(recipe, tmp_path):
    (tmp_path / "sub").mkdir()
    own = tmp_path / "sub/own.yaml"
    recipe.write_text(recipe.read_text() + "parallel: {recompute: true}\nmodel.loss_type: per_token_loss\n")
    own.write_text(
        "base: ../recipe.yaml\ntraining: {lr: 1.0e-4, save: runs/own}\nmodel: {loss_cfg: {loss_type: default}}\n"
    )
    overrides = ["training.lr=1e-4", "training.save=runs/own", "model.loss_cfg.loss_type=default"]
    assert load_settings(own) == load_settings(recipe, overrides) != load_settings(recipe)
    assert load_settings(own, ["training.lr=2e-4"]).training.lr == 2e-4
    own.write_text("base: ../recipe.yaml\n")
    assert load_settings(own) == load_settings(recipe)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: none.yaml", r"none\.yaml: no such recipe"),
        ("base: [recipe.yaml]", r"own\.yaml: base: \['recipe.yaml'\] is not the path of a recipe, from this one's"),
        ("base: own.yaml", r"own\.yaml: base: a base has no base itself"),
        ("base: recipe.yaml\ntraining: {lrr: 1}", r"unknown setting training\.lrr"),
        ("base: recipe.yaml\nbase: recipe.yaml", r"own\.yaml, line 2, column 1: base is there twice"),
        ("base: recipe.yaml\ntraining:", r"own\.yaml: training: says nothing, while recipe\.yaml sets training\."),
        ("training: {base: recipe.yaml}", r"unknown setting training\.base"),
    ],
)
def test_a_wrong_base_is_named(recipe, tmp_path, text, words):
    own = tmp_path / "own.yaml"
    own.write_text(text + "\n")
    with pytest.raises(SettingError, match=words):
        load_settings(own)


def test_a_section_on_the_command_line_changes_what_it_names(recipe):
    """As one over a base does: what else the recipe sets in it is not lost."""
    recipe.write_text(
        recipe.read_text() + "model.loss_cfg: {router_aux_loss_coef: 0.5}\nmodel.kernels: {swiglu: native}\n"
    )
    s = load_settings(recipe, ["model.loss_cfg={loss_type: per_token_loss}", "model.kernels={rms_norm: native}"])
    assert (s.model.loss_cfg.loss_type, s.model.loss_cfg.router_aux_loss_coef) == ("per_token_loss", 0.5)
    assert s.model.kernels == {"swiglu": "native", "rms_norm": "native"}
    s = load_settings(recipe, ["model.loss_cfg=null", "model.loss_cfg={loss_type: per_token_loss}", "model.kernels={}"])
    assert s.model.loss_cfg.router_aux_loss_coef == 0 and s.model.kernels == {}


@pytest.mark.parametrize("nothing", ["null", "", "{}"])
def test_an_empty_section_does_not_take_away_that_of_a_base_in_silence(recipe, tmp_path, nothing):
    """On the command line `training.lora=null` does; here the base's adapters would be trained."""
    own = tmp_path / "own.yaml"
    recipe.write_text(recipe.read_text() + "training.lora: {r: 8}\n")
    own.write_text(f"base: recipe.yaml\ntraining:\n  lr: 1.0e-4\n  lora: {nothing}\n")
    words = (
        r"own\.yaml: training\.lora: says nothing, while recipe\.yaml sets training\.lora\.r; .* training\.lora=null$"
    )
    with pytest.raises(SettingError, match=words):
        load_settings(own)
    own.write_text("base: recipe.yaml\ntraining: {lora: {enable: false}}\n")
    assert load_settings(own).training.lora is load_settings(recipe, ["training.lora=null"]).training.lora is None
    assert load_settings(recipe).training.lora == LoraSettings(r=8)


def test_written_settings_are_read_back(recipe, tmp_path):
    s = load_settings(recipe, ["model.kernels.swiglu=native", "training.adam_eps=1e-9"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(s))
    assert load_settings(again) == s


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rate=1", "training.learning_rate is no setting; it is training.lr here"),
        ("training.train_iter=1", "unknown setting training.train_iter; did you mean training.train_iters?"),
        ("lr=1", "unknown setting lr; did you mean training.lr?"),
        ("model.los_type=default", "unknown setting model.los_type"),
        (
            "data.dataset_param.basic_parameters.cutof_len=5",
            "did you mean data.dataset_param.basic_parameters.cutoff_len?",
        ),
        ("training.lr", "is not of the form a.b=c"),
        (
            "--learning_rate",
            "--learning_rate is no option, and settings are given as a.b=c: learning_rate is no setting;",
        ),
        ("--training.lr=3", "--training.lr=3 is no option, and settings are given as a.b=c: write training.lr=…"),
        ("model.freeze={*}.mlp]", "model.freeze: '{*}.mlp]' is not YAML"),
        ("training.lr=.inf", "training.lr: inf must be a finite number"),
        ("training.lr=fast", "training.lr: 'fast' is not of type float"),
        ("training.train_iters=1.5", "training.train_iters: 1.5 is not of type int"),
        ("training.train_iters=true", "training.train_iters: True is not of type int"),
        ("training.train_iters=0", "training.train_iters: 0 must be more than 0"),
        (
            "training.lr_decay_style=cosin",
            "training.lr_decay_style: 'cosin' is not one of 'constant', 'linear' or 'cosine'",
        ),
        ("training.lr_warmup_ratio=1", "training.lr_warmup_ratio: 1 must be below 1"),
        ("training.clip_grad=-1", "training.clip_grad: -1 must be 0 or more"),
        ("training.timeout=1e308", "training.timeout: '1e308' must be at most 31536000"),
        ("training.save=~/x", "training.save: '~/x': ~ is not expanded here, it would be a folder of that name"),
        (
            "training.save=$SCRATCH/x",
            r"training.save: '$SCRATCH/x': $SCRATCH is not expanded here, it would be a folder",
        ),
        (
            "data.dataset_param.basic_parameters.cache_dir=/tmp/${USER}/x",
            "cache_dir: '/tmp/${USER}/x': ${USER} is not expanded",
        ),
        (
            "data.dataset_param.basic_parameters.dataset=a.json, ~/b.json",
            "dataset: 'a.json, ~/b.json': ~ is not expanded",
        ),
        ("training.min_lr=1", "training.min_lr 1.0 is above training.lr"),
        ("training.load=x", "training.load and training.init_from_hf_path both say where the weights come from"),
        ("model.freeze=model.visual", "model.freeze: 'model.visual' is not a list"),
        ("parallel.recompute=maybe", "parallel.recompute: 'maybe' is not of type bool and is not one of 'selective'"),
        (
            "data.dataset_param.preprocess_parameters.image_min_pixels=999999",
            "data.dataset_param.preprocess_parameters.image_min_pixels 999999 is above image_max_pixels 262144",
        ),
        (
            "data.dataset_param.basic_parameters.template=qwen2",
            "is not one of 'qwen3_vl_nothink', 'qwen3_5' or 'checkpoint'",
        ),
        ("training={}", "training.save is not set"),
        ("training.lora.lora_alpha=8", "training.lora.r is not set; it has no default"),
        ("training.lora.r=12", "training.lora.r: 12 is no multiple of 8"),
        ("training.lora.rnk=8", "unknown setting training.lora.rnk; did you mean training.lora.r"),
        ("training.lora={r: 8, rank: 8}", "training.lora: training.lora.r is there twice"),
        ("training.lora={r: 8, enable: 1}", "training.lora.enable: 1 is not of type bool"),
        ("training.lora={r: 8, expert_r: 8}", "training.lora.expert_r means nothing without target_parameters"),
        ("training.lora={r: 8, target_modules: []}", "both empty, so nothing would be trained"),
        ("training.lora=8", "training.lora: 8 is not a section"),
    ],
)
def test_mistakes_are_named(recipe, override, words):
    with pytest.raises(SettingError) as caught:
        load_settings(recipe, [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_adapters_in_the_words_of_mindspeed(recipe):
    section = "training.lora={enable: true, rank: 16, alpha: 8, pretrained_lora_path: x, target_modules: [q_proj]}"
    lora = load_settings(recipe, [section]).training.lora
    assert lora == LoraSettings(r=16, lora_alpha=8.0, adapter="x", target_modules=("q_proj",))
    assert load_settings(recipe, [section, "training.lora.enable=false"]) == load_settings(recipe)


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ("model.freeze=[model.visual]", "model.freeze means nothing beside training.lora, which freezes all but"),
        ("model.mtp_num_layers=1", "model.mtp_num_layers means nothing beside training.lora: servers take no"),
        ("model.kernels.moe_experts_parallel=alltoallv_gmm", "alltoallv_gmm has no place for adapters between"),
    ],
)
def test_what_adapters_do_not_go_with(recipe, beside, words):
    with pytest.raises(SettingError, match=words):
        load_settings(recipe, [beside, "training.lora={r: 8, target_parameters: [mlp.experts.down_proj]}"])


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ("training.neftune_noise_alpha=5", "training.neftune_noise_alpha cannot be combined with training.stage: dpo"),
        ("training.val_generate=true", "training.val_generate cannot be combined"),
        (
            "training.save_best=exact_match",
            "training.save_best: exact_match cannot be combined with training.stage: dpo",
        ),
        ("model.mtp_num_layers=1", "model.mtp_num_layers cannot be combined"),
        ("model.loss_cfg.loss_type=per_token_loss", "model.loss_cfg.loss_type cannot be combined"),
        ("training.lora={r: 8, adapter: x}", "training.lora.adapter cannot be combined .* merge it into the weights"),
        ("training.dpo={loss: ipo, label_smoothing: 0.1}", "label_smoothing means nothing to loss: ipo"),
        ("training.dpo.label_smoothing=0.5", "training.dpo.label_smoothing: 0.5 must be below 0.5"),
        ("training.dpo.loss=hinge", "training.dpo.loss: 'hinge' is not one of 'sigmoid' or 'ipo'"),
        (
            "data.dataset_param.basic_parameters.train_on_prompt=true",
            "train_on_prompt means nothing to training.stage: dpo",
        ),
        ("data.dataset_param.basic_parameters.mask_history=true", "^data.dataset_param.*mask_history means nothing to"),
        ("data.val_dataset_param.basic_parameters.mask_history=true", "^data.val_dataset_param.*mask_history means"),
        (
            "data.dataset_param.basic_parameters.multi_turn=joined",
            "multi_turn means nothing to .* the answers of a pair",
        ),
        ("data.dataset_param.basic_parameters.truncation=truncate", "truncate would cut answers that are compared"),
        ("training.stage=sft", "training.dpo means nothing without training.stage: dpo"),
    ],
)
def test_what_preference_tuning_does_not_go_with(recipe, beside, words):
    validating = ["data.val_dataset_param.basic_parameters.dataset=a.json", "training.val_interval=1"]
    dpo = ["training.stage=dpo", "training.dpo.beta=0.2", *validating]
    assert load_settings(recipe, dpo).training.dpo == DpoSettings(beta=0.2)
    with pytest.raises(SettingError, match=words):
        load_settings(recipe, [*dpo, beside])


def test_names_of_the_fields_of_pairs(recipe):
    attr = "data.dataset_param.attr"
    names = [f"{attr}.prompt=p", f"{attr}.chosen=good", f"{attr}.rejected=bad"]
    assert load_settings(recipe, ["training.stage=dpo", *names]).data.dataset_param.attr.chosen == "good"
    for name, words in (
        (names[0], "prompt is read in files of format: alpaca alone, and none is"),
        (names[1], "chosen is read with training.stage: dpo alone; set that, or leave it out"),
        (names[2], "rejected is read with training.stage: dpo alone"),
    ):
        with pytest.raises(SettingError, match=rf"^{attr}\.{words}"):
            load_settings(recipe, [name])
    entry = "[{file: a.json, attr: {chosen: good}}]"
    with pytest.raises(SettingError, match=r"dataset\[0\]\.attr\.chosen is read with training\.stage: dpo alone"):
        load_settings(recipe, [f"data.dataset_param.basic_parameters.dataset={entry}"])
    with pytest.raises(SettingError, match=r"chosen and rejected are both 'x'; give each its own name"):
        load_settings(recipe, ["training.stage=dpo", f"{attr}.chosen=x", f"{attr}.rejected=x"])


def test_rules_of_the_template(recipe):
    nothink = "data.dataset_param.basic_parameters.template=qwen3_vl_nothink"
    with pytest.raises(SettingError, match="enable_thinking means nothing to template qwen3_vl_nothink"):
        load_settings(recipe, [nothink, "data.dataset_param.basic_parameters.enable_thinking=true"])
    both = [f"data.dataset_param.basic_parameters.{name}=true" for name in ("train_on_prompt", "mask_history")]
    with pytest.raises(SettingError, match="train_on_prompt and mask_history contradict"):
        load_settings(recipe, both)


def test_errors_of_the_validation_set_name_its_own_path(recipe):
    validating = ["data.val_dataset_param.basic_parameters.dataset=a.json", "training.val_interval=1"]
    limits = "data.val_dataset_param.preprocess_parameters"
    with pytest.raises(SettingError, match=rf"^{limits}\.video_min_pixels 99999 is above video_max_pixels 65536$"):
        load_settings(recipe, [*validating, f"{limits}.video_min_pixels=99999"])


def test_a_missing_or_broken_recipe(tmp_path):
    with pytest.raises(SettingError, match="no such recipe"):
        load_settings(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(SettingError, match="not YAML"):
        load_settings(broken)
    broken.write_text("- a")
    with pytest.raises(SettingError, match="a recipe is a mapping"):
        load_settings(broken)


def test_a_required_setting():
    with pytest.raises(SettingError, match=r"data\.dataset_param\.basic_parameters\.dataset is not set"):
        from_flat({})


def test_a_run_is_as_long_as_one_setting_says(recipe, tmp_path):
    """Epochs or steps: an override, or a recipe above its base, takes the place of the other."""

    def length(path, *overrides):
        t = load_settings(path, overrides).training
        return t.train_epochs, t.train_iters

    own = tmp_path / "own.yaml"
    own.write_text("base: recipe.yaml\ntraining: {train_epochs: 2}\n")
    assert length(recipe) == (None, 10) and length(own) == (2.0, None)
    assert length(own, "training.train_iters=20") == (None, 20)
    assert length(recipe, "training.train_epochs=0.5") == (0.5, None)
    for wrong in (
        ("training.train_iters=20", "training.train_epochs=1"),
        ("training.train_epochs=1", "training.train_iters=20"),
    ):
        with pytest.raises(SettingError, match=r"training\.train_epochs and training\.train_iters both say how long"):
            length(recipe, *wrong)
    with pytest.raises(SettingError, match=r"training\.train_epochs is not set, and neither is train_iters"):
        length(recipe, "training.train_iters=null")
    with pytest.raises(SettingError, match=r"training\.train_epochs: 0 must be more than 0"):
        length(recipe, "training.train_epochs=0")


def test_names_with_dots_are_keys_of_a_mapping(recipe, tmp_path):
    """In their order, in any form, and one that begins another replaces only its own value."""
    given = {"model.visual.merger": 2.0, "model.visual": 0.5, "lm_head": 1.0}
    text = "training.lr_by_module={model.visual.merger: 2, model.visual: 0.1, lm_head: 1}"
    s = load_settings(recipe, [text, "training.lr_by_module.model.visual=0.5"])
    assert list(s.training.lr_by_module.items()) == list(given.items())
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(s))
    assert list(load_settings(again).training.lr_by_module.items()) == list(given.items())
    nested = load_settings(recipe, ["training.lr_by_module={model: {visual: 0.5}}"])
    assert nested.training.lr_by_module == {"model.visual": 0.5}
    with pytest.raises(SettingError, match=r"training\.lr_by_module\.model\.visual: 0 must be more than 0"):
        load_settings(recipe, ["training.lr_by_module.model.visual=0"])
