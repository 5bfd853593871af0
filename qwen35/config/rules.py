"""Rules across settings that are valid by themselves. Only what is certainly wrong is refused."""

import re
from collections.abc import Iterator
from pathlib import Path

from qwen35.config.schema import (
    TRAIN_SET,
    VALIDATION_SET,
    DpoSettings,
    LossCfg,
    ModelSettings,
    ProfileSettings,
    Settings,
    attr_of,
    dataset_entries,
    for_validation,
)
from qwen35.errors import SettingError

FLA_DELTA_RULE = ("gated_delta_rule", "chunk_gated_delta_rule")  # the operator's two names in model.kernels
CHECKPOINT_NAME = re.compile(r"release|iter_\d{7,}")  # a checkpoint's folder inside training.save


def check_rules(s: Settings) -> None:
    """Raises SettingError for the first rule that is violated."""
    every = (
        _data_rules,
        _dpo_rules,
        _validation_rules,
        _training_rules,
        _lora_rules,
        _profile_rules,
        _folders_rules,
        _names_rules,
    )
    for rules in every:
        for violation in rules(s):
            raise SettingError(violation)


def _data_rules(s: Settings) -> Iterator[str]:
    b, p = s.data.dataset_param.basic_parameters, s.data.dataset_param.preprocess_parameters
    basic, limits = f"{TRAIN_SET}.basic_parameters", f"{TRAIN_SET}.preprocess_parameters"
    if p.image_min_pixels > p.image_max_pixels:
        yield f"{limits}.image_min_pixels {p.image_min_pixels} is above image_max_pixels {p.image_max_pixels}"
    if p.video_min_pixels > p.video_max_pixels:
        yield f"{limits}.video_min_pixels {p.video_min_pixels} is above video_max_pixels {p.video_max_pixels}"
    for name in ("enable_thinking", "preserve_thinking", "reasoning_effort"):
        if getattr(b, name) is not None and b.template == "qwen3_vl_nothink":
            yield f"{basic}.{name} means nothing to template {b.template}; use template: qwen3_5 or leave it out"
    if b.reasoning_effort is not None and b.enable_thinking is False:
        yield f"{basic}.reasoning_effort means nothing with enable_thinking: false; leave it out"
    if b.train_on_prompt and b.template == "checkpoint":
        yield f"{basic}: template: checkpoint trains only what the template generates; leave train_on_prompt out"
    if b.train_on_prompt and b.mask_history:
        yield f"{basic}: train_on_prompt and mask_history contradict each other; set one"


def _validation_rules(s: Settings) -> Iterator[str]:
    t, val = s.training, s.data.val_dataset_param
    if t.val_interval and not val:
        yield "training.val_interval says when to validate, and nothing on which data; set data.val_dataset_param"
    if val and not t.val_interval:
        yield "data.val_dataset_param means nothing without training.val_interval; set that, or leave it out"
    if t.val_generate and not t.val_interval:
        yield "training.val_generate means nothing without training.val_interval; set that, or leave it out"
    for name in ("save_best", "early_stopping_patience"):
        if getattr(t, name) and not t.val_interval:
            yield f"training.{name} means nothing without training.val_interval; set that, or leave it out"
    if t.save_best == "exact_match" and not t.val_generate:
        yield "training.save_best: exact_match compares answers; set training.val_generate: true, or compare by loss"
    if val and any(entry.weight != 1 for entry in dataset_entries(val.basic_parameters.dataset)):
        yield "data.val_dataset_param: a validation takes each record once; leave the weights out"
    if s.validation:
        violations = (*_data_rules(s.validation), *_names_rules(s.validation))
        yield from (for_validation(violation) for violation in violations)


def _training_rules(s: Settings) -> Iterator[str]:
    t, params = s.training, [s.data.dataset_param, *([s.data.val_dataset_param] if s.data.val_dataset_param else [])]
    cutoff_len = max(param.basic_parameters.cutoff_len for param in params)
    if t.train_iters is None and t.train_epochs is None:
        yield "training.train_epochs is not set, and neither is train_iters: one of them says how long the run is"
    if t.train_iters is not None and t.train_epochs is not None:
        yield "training.train_epochs and training.train_iters both say how long the run is; set one"
    if t.min_lr > t.lr:
        yield f"training.min_lr {t.min_lr} is above training.lr {t.lr}"
    if t.min_lr and t.lr_decay_style == "constant":
        yield f"training.min_lr {t.min_lr} means nothing to lr_decay_style: constant; use linear or cosine, or leave it out"
    if not s.model.mtp_num_layers and s.model.mtp_loss_scaling_factor != ModelSettings.mtp_loss_scaling_factor:
        yield (
            f"model.mtp_loss_scaling_factor {s.model.mtp_loss_scaling_factor} means nothing without model.mtp_num_layers: 1;"
            " set that, or leave it out"
        )
    if s.parallel.recompute == "selective" and "fla" in (s.model.kernels.get(op) for op in FLA_DELTA_RULE):
        yield (
            "parallel.recompute: selective means nothing to fla's delta rule, whose backward reruns its forward; set"
            " recompute: true, or model.kernels.gated_delta_rule to triton"
        )
    if t.expert_balance and s.parallel.expert_parallel_size == 1:
        yield (
            f"training.expert_balance {t.expert_balance} means nothing without parallel.expert_parallel_size above 1; set that,"
            " or leave it out"
        )
    if t.expert_balance and not t.save_interval and not t.save_best:
        yield "training.expert_balance moves experts when the run saves; set training.save_interval, or leave it out"
    if t.load and t.init_from_hf_path:
        yield "training.load and training.init_from_hf_path both say where the weights come from; set one"
    if t.micro_batch_size * cutoff_len >= 2**31:  # cu_seqlens is int32
        yield (
            f"training.micro_batch_size {t.micro_batch_size} x cutoff_len {cutoff_len}: a micro-batch must have fewer than"
            f" {2**31:,} tokens"
        )


def _lora_rules(s: Settings) -> Iterator[str]:
    lora, exchange, beside = (
        s.training.lora,
        s.model.kernels.get("moe_experts_parallel"),
        "means nothing beside training.lora",
    )
    if not lora:
        return
    if s.model.freeze:
        yield f"model.freeze {beside}, which freezes all but the adapters; leave it out, see training.lora.exclude_modules"
    if s.model.mtp_num_layers:
        yield f"model.mtp_num_layers {beside}: servers take no adapter of that layer; leave it out, an export still has it"
    if not lora.target_modules and not lora.target_parameters:
        yield "training.lora: target_modules and target_parameters are both empty, so nothing would be trained; name some"
    if lora.expert_r and not lora.target_parameters:
        yield "training.lora.expert_r means nothing without target_parameters; set them, or leave it out"
    if lora.target_parameters and exchange == "alltoallv_gmm":
        yield (
            "model.kernels.moe_experts_parallel: alltoallv_gmm has no place for adapters between its matmul and its"
            " exchange; use auto with training.lora.target_parameters"
        )


def _dpo_rules(s: Settings) -> Iterator[str]:
    t, params = s.training, [s.data.dataset_param, *([s.data.val_dataset_param] if s.data.val_dataset_param else [])]
    if t.stage == "sft":
        if t.dpo != DpoSettings():
            yield "training.dpo means nothing without training.stage: dpo; set that, or leave it out"
        return
    unused = {
        "training.neftune_noise_alpha": t.neftune_noise_alpha,  # the reference's log-probabilities have none
        "training.val_generate": t.val_generate,
        "training.save_best: exact_match": t.save_best == "exact_match",
        "model.mtp_num_layers": s.model.mtp_num_layers,
        "model.loss_cfg.loss_type": s.model.loss_cfg.loss_type != LossCfg.loss_type,
        "training.lora.adapter": t.lora and t.lora.adapter,
    }
    for name in (name for name, value in unused.items() if value):
        why = "; merge it into the weights first, as docs/guide.md says" * name.endswith("adapter")
        yield f"{name} cannot be combined with training.stage: dpo; leave it out{why}"
    if t.dpo.label_smoothing and t.dpo.loss == "ipo":
        yield "training.dpo.label_smoothing means nothing to loss: ipo; leave it out"
    for param, place in zip(params, (TRAIN_SET, VALIDATION_SET), strict=False):
        b, basic = param.basic_parameters, f"{place}.basic_parameters"
        unread = (("train_on_prompt", False), ("mask_history", False), ("multi_turn", "split"))
        for name in (name for name, harmless in unread if getattr(b, name) != harmless):
            yield f"{basic}.{name} means nothing to training.stage: dpo, which trains the answers of a pair alone; leave it out"
        if b.truncation == "truncate":
            yield f"{basic}.truncation: truncate would cut answers that are compared; use drop or error"


def _profile_rules(s: Settings) -> Iterator[str]:
    p = s.training.profile
    if not p.steps and p != ProfileSettings():
        yield "training.profile means nothing without training.profile.steps; set that, or leave it out"
    if not p.steps:
        return
    if s.training.train_iters:  # else the data tells
        yield from profile_rule(p, s.training.train_iters, "training.train_iters")
    if not p.ranks:
        yield "training.profile.ranks: [] must name at least one rank"
    parts = Path(p.folder).parts
    if not parts or Path(p.folder).is_absolute() or ".." in parts or CHECKPOINT_NAME.match(parts[0]):
        yield f"training.profile.folder: {p.folder} must be a folder below training.save, and not a checkpoint's"


def profile_rule(p: ProfileSettings, steps: int, setting: str) -> Iterator[str]:
    """setting: the one that gives the run so many steps."""
    last = p.start + p.steps - 1
    if p.steps and last > steps:
        yield f"training.profile: steps {p.start} to {last} are not all among the {steps} of {setting}"


def _folders_rules(s: Settings) -> Iterator[str]:
    """No run may write into a model folder: `make export` copies it, and loaders read all of it."""
    t, cache_dir = s.training, s.data.dataset_param.basic_parameters.cache_dir
    val = s.data.val_dataset_param
    if CHECKPOINT_NAME.fullmatch(Path(t.save).name):
        yield f"training.save: {t.save} is named like a checkpoint in a save folder; name the folder above it"
    sources = {
        "model.model_name_or_path": s.model.model_name_or_path,
        "preprocess_parameters.model_name_or_path": s.tokenizer_dir,
        "training.init_from_hf_path": t.init_from_hf_path,
    }
    for name, written in (
        ("training.save", t.save),
        ("basic_parameters.cache_dir", cache_dir),
        ("data.val_dataset_param.basic_parameters.cache_dir", val and val.basic_parameters.cache_dir),
    ):
        for source, folder in sources.items():
            if written and folder and Path(written).resolve().is_relative_to(Path(folder).resolve()):
                yield f"{name}: {written} lies in {source} {folder}; name a folder outside it"


COLUMNS: tuple[str, ...] = ("prompt", "query", "response", "history")
SIDES = ("chosen", "rejected")
TURNS: tuple[str, ...] = (
    "role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag", "observation_tag", "function_tag",
)  # fmt: skip
READ_BY = {"alpaca": COLUMNS, "sharegpt": ("messages", *TURNS)}  # format -> the names that no other reads


def _names_rules(s: Settings) -> Iterator[str]:
    param, has_pairs = s.data.dataset_param, s.training.stage == "dpo"
    entries = dataset_entries(param.basic_parameters.dataset)
    attrs = {f"{TRAIN_SET}.basic_parameters.dataset[{i}].attr": [e] for i, e in enumerate(entries) if e.attr}
    attrs[f"{TRAIN_SET}.attr"] = [entry for entry in entries if not entry.attr]
    for where, users in attrs.items():
        attr = (users[0].attr if users else None) or param.attr
        groups = (("messages", "images", "videos", "tools", "system", *COLUMNS, *SIDES), TURNS[:2], TURNS[2:])
        for names in groups:
            given = {name: getattr(attr, name) for name in names if getattr(attr, name) is not None}
            same = [name for name, value in given.items() if list(given.values()).count(value) > 1]
            if same:
                yield f"{where}: {' and '.join(same)} are both {given[same[0]]!r}; give each its own name"
        formats = {attr_of(entry, attr).format for entry in users}
        for kind, names in READ_BY.items():
            unread = [name for name in names if getattr(attr, name) and not (has_pairs and name == "prompt")]
            if users and kind not in formats and unread:
                yield f"{where}.{unread[0]} is read in files of format: {kind} alone, and none is; leave it out"
        if not has_pairs and (unread := [name for name in SIDES if getattr(attr, name)]):
            yield f"{where}.{unread[0]} is read with training.stage: dpo alone; set that, or leave it out"
