"""What a run goes on from, and what must not have changed meanwhile."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen35.checkpoint.dcp import EXTRA, RANK_EXTRA, CheckpointInfo, newest_checkpoint, read_info, resolve_load
from qwen35.checkpoint.dcp_folder import damaged, keep_newest
from qwen35.config.load import SettingError, difference, load_settings
from qwen35.config.schema import Settings
from qwen35.model import ModelConfig
from qwen35.training.metrics import RunError
from qwen35.training.rng import BROKEN_STATES, restore_rng

DATA_ORDER = ("data.", "model.model_name_or_path", "training.seed")  # the settings that decide what is in each bin
WITHOUT_EFFECT = (  # settings of which what is trained does not depend
    "training.log_interval", "training.save_interval", "training.save_total_limit", "training.async_save",
    "training.peak_tflops", "training.zero_grad_patience", "training.timeout", "training.max_restarts",
    "training.profile.", "training.val_", "data.val_dataset_param",
    "data.dataloader_param.num_workers", "data.dataset_param.basic_parameters.cache_dir",
)  # fmt: skip
NOT_TRAINED_BY = ("text.initializer_range",)  # of a model's config: it has done its part
ANEW = "start anew from its weights: make export, then training.init_from_hf_path and another save"


def find_weights(settings: Settings) -> tuple[Path, bool]:
    """The newest whole checkpoint in `save`, else `load`, else `init_from_hf_path`, and whether it is that.

    All ranks take what rank 0 finds: where another job is saving, the next one to look may find another.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _find_weights(settings))
    return found[0]


def _find_weights(settings: Settings) -> tuple[Path, bool]:
    t = settings.training
    newest = newest_checkpoint(t.save)
    if newest or t.load:
        return newest or resolve_load(t.load or ""), False
    if t.init_from_hf_path:
        return Path(t.init_from_hf_path), True
    raise SettingError(
        "nothing says where the weights come from; set training.load (DCP) or training.init_from_hf_path"
    )


def check_same_data(fingerprint: str) -> None:
    """Every rank reads the records by itself: raises RunError on all of them if they did not find the same samples."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, fingerprint)
    others = [str(rank) for rank, one in enumerate(found) if one != found[0]]
    if others:
        raise RunError(
            f"rank{'s' * (len(others) > 1)} {', '.join(others)} found other samples than rank 0: the records, the images, "
            "the processor or the tokenizer differ; with on_bad_record: error the first missing one is named"
        )


def position_of(settings: Settings, config: ModelConfig, fingerprint: str, levels: Mapping[str, Any]) -> dict[str, Any]:
    """Kept in each checkpoint: what decides the course of the steps after it, besides weights and settings.

    Step s of any run with so many bins a step, however they are split over ranks and micro-steps, takes the same bins.
    """
    return {
        "bins_a_step": sequences_per_step(settings),
        "data": fingerprint,
        "model": asdict(config),
        "levels": dict(levels),
        "mtp_num_layers": settings.model.mtp_num_layers,
    }


def checked_facts(checkpoint: Path, settings: Settings, device: torch.device) -> CheckpointInfo:
    """What a checkpoint holds besides tensors, before the data is read.

    Raises CheckpointError for what is missing or of a wrong form, SettingError for settings that do not go with it.
    """
    loaded = read_info(checkpoint)
    if not loaded.step:  # converted weights
        return loaded
    for name, kind in (("bins_a_step", int), ("data", str)):
        if type(loaded.extra.get(name)) is not kind:
            raise damaged(loaded.path, EXTRA, f"does not hold {name} as a run writes it")
    for name in ("model", "levels"):
        if not isinstance(loaded.extra.get(name, {}), Mapping):
            raise damaged(loaded.path, EXTRA, f"does not hold {name} as a run writes it")
    if loaded.world_size == dist.get_world_size():
        own = RANK_EXTRA.format(dist.get_rank())
        if loaded.rank_extra is None:
            raise damaged(loaded.path, own, "is missing: the random states of this rank")
        try:
            restore_rng(loaded.rank_extra, device)  # and again when all is loaded, which may draw from them
        except BROKEN_STATES:
            raise damaged(loaded.path, own, "does not hold the random states of a rank") from None
    if loaded.extra.get("mtp_num_layers") and not settings.model.mtp_num_layers:
        raise SettingError(
            f"{loaded.path} was trained with model.mtp_num_layers: 1; without it what that layer learnt would be lost. Put it"
            f" back, or {ANEW}"
        )
    before, now = loaded.extra["bins_a_step"], sequences_per_step(settings)
    if before != now:
        raise SettingError(
            f"{loaded.path} was trained with {before} bins a step (micro_batch_size x gradient_accumulation_steps x"
            f" processes), these settings make {now}: the data cannot go on where it stopped. Keep the product"
        )
    return loaded


def check_position(loaded: CheckpointInfo, position: dict[str, Any], settings: Settings) -> None:
    """Raises SettingError where the run could not go on as if it had never stopped."""
    if loaded.extra.get("data") != position["data"]:
        changed = [
            c
            for c in changes(loaded.path.parent, settings)
            if c.startswith(DATA_ORDER) and not c.startswith(WITHOUT_EFFECT)
        ]
        why = "; ".join(changed) or "the records, or the tokenizer, are not what they were, or others were skipped"
        raise SettingError(
            f"{loaded.path} was trained on other data, or in another order ({why}): it cannot go on where it stopped. Put that"
            f" back, or {ANEW}"
        )
    for name, what in (("model", "as another model, by its config.json"), ("levels", "on pixels of other levels")):
        was, now = _flat(loaded.extra.get(name, {})), _flat(position[name])
        changed = [f"{k}: {was[k]} -> {v}" for k, v in now.items() if was.get(k, v) != v and k not in NOT_TRAINED_BY]
        if changed:
            raise SettingError(f"{loaded.path} was trained {what} ({'; '.join(changed)}). Put that back, or {ANEW}")


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    """{"text": {"hidden_size": 48}, …} -> {"text.hidden_size": 48, …}"""
    flat: dict[str, Any] = {}
    for key, value in model.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def sequences_per_step(settings: Settings) -> int:
    t, data_size = settings.training, dist.get_world_size() // settings.parallel.ulysses_parallel_size
    return t.micro_batch_size * t.gradient_accumulation_steps * data_size


def changes(folder: Path, settings: Settings) -> list[str]:
    """The settings that are not those which the run of a save folder had last."""
    recipe = folder / "config.yaml"
    return difference(load_settings(recipe), settings) if recipe.is_file() else []


def check_finished(folder: Path, step: int, changed: list[str], settings: Settings) -> None:
    """Raises SettingError if a folder that is not to be trained further holds another run than the settings say.

    Also if it holds none, for then it is the run of training.load that is done, and the whole of this one would be nothing.
    Else the first rank removes the checkpoints that the run would have removed, had it not been stopped at its end.
    """
    if newest_checkpoint(folder) is None:
        raise SettingError(
            f"training.load: {settings.training.load} has done {step} steps, and training.train_iters is "
            f"{settings.training.train_iters}: a larger one goes on from there; or {ANEW}"
        )
    if telling := [change for change in changed if not change.startswith(WITHOUT_EFFECT)]:
        raise SettingError(
            f"{folder} holds {step} steps of other settings ({'; '.join(telling)}); name another save, or go on with a "
            "larger training.train_iters"
        )
    limit = settings.training.save_total_limit
    if limit is not None and dist.get_rank() == 0:
        keep_newest(folder, limit)
