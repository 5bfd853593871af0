"""What must not have changed when a run goes on from a checkpoint, and the random states."""

import itertools
import os
import random
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qwen35.checkpoint import dcp_folder
from qwen35.checkpoint.dcp import EXTRA, RANK_EXTRA, CheckpointInfo, read_info
from qwen35.checkpoint.dcp_folder import ITERATION, damaged, keep_newest, newest_checkpoint
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.folders import remove_leftovers
from qwen35.config.load import SettingError, difference, load_settings
from qwen35.config.schema import Settings, TrainingSettings
from qwen35.device import device_rng_state, set_device_rng_state
from qwen35.log import logger
from qwen35.model.config import ModelConfig, differences
from qwen35.training.metrics import RunError
from qwen35.training.report import write_report
from qwen35.wording import number_of

DATA_ORDER = ("data.", "model.model_name_or_path", "training.seed")  # these decide what each packed sequence holds
WITHOUT_EFFECT = (  # settings that do not change what is trained
    "training.log_interval", "training.report_to", "training.save_interval", "training.save_total_limit", "training.async_save",
    "training.peak_tflops", "training.zero_grad_patience", "training.timeout", "training.max_restarts",
    "training.profile.", "training.val_", "data.val_dataset_param",
    "data.dataloader_param.num_workers", "data.dataset_param.basic_parameters.cache_dir",
)  # fmt: skip
# what `restore_rng` raises for states that are damaged
BROKEN_STATES = (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
START_ANEW = "start anew from its weights: make export, then training.init_from_hf_path and another save"


def repair_save_folder(folder: Path) -> list[str]:
    """Tidy up a save folder that this job has locked, after interrupted jobs. Returns messages.

    Incomplete checkpoints newer than the one to resume from are kept under another name. Raises
    CheckpointError as `find_newest` does.
    """
    lines = remove_leftovers(folder, ITERATION)
    newest, broken = dcp_folder.find_newest(folder)
    for path, why in broken:
        aside = next(
            p for n in itertools.count() if not (p := path.with_name(f"{path.name}.damaged{n or ''}")).exists()
        )
        path.rename(aside)
        lines.append(f"{path} is incomplete ({why}): renamed to {aside.name}, and the run goes on from {newest}")
    if newest and ITERATION.fullmatch(newest.name) and dcp_folder.latest(folder) != newest.name:
        dcp_folder.write_latest(folder, int(newest.name[5:]))
        why = "" if broken else ": a job was stopped before it updated the file"
        lines.append(f"{folder / dcp_folder.LATEST} now names {newest.name}{why}")
    return lines


def check_same_data(fingerprint: str) -> None:
    """Raises RunError on all ranks unless all, each reading the data, found the same samples."""
    fingerprints = [""] * dist.get_world_size()
    dist.all_gather_object(fingerprints, fingerprint)
    others = [str(rank) for rank, other in enumerate(fingerprints) if other != fingerprints[0]]
    if others:
        raise RunError(
            f"rank{'s' * (len(others) > 1)} {', '.join(others)} found other samples than rank 0: the records, the images, "
            "the processor or the tokenizer differ; set on_bad_record: error to see the first missing record"
        )


def make_extra(
    settings: Settings, config: ModelConfig, fingerprint: str, levels: Mapping[str, Any], world: int | None = None
) -> dict[str, Any]:
    """The contents of a checkpoint's extra.json: what must not change for the run to go on.

    As long as the number of packed sequences per step stays the same, a step trains on the same
    ones, however they are split over ranks and micro-steps.
    """
    return {
        "bins_a_step": sequences_per_step(settings, world),
        "data": fingerprint,
        "model": asdict(config),
        "levels": dict(levels),
        "mtp_num_layers": settings.model.mtp_num_layers,
    }


def read_checked_info(checkpoint: Path, settings: Settings, device: torch.device) -> CheckpointInfo:
    """What a checkpoint holds besides tensors, checked before the data is read.

    Raises CheckpointError if it is damaged, SettingError if these settings cannot continue it.
    """
    loaded = read_info(checkpoint)
    if not loaded.step:  # converted weights
        return loaded
    check_info(loaded, settings, dist.get_world_size())
    if loaded.world_size == dist.get_world_size():
        rank_file = RANK_EXTRA.format(dist.get_rank())
        if loaded.rank_extra is None:
            raise damaged(loaded.path, rank_file, "is missing: the random states of this rank")
        try:
            restore_rng(loaded.rank_extra, device)  # only a check: setup restores them after the last draw
        except BROKEN_STATES:
            raise damaged(loaded.path, rank_file, "does not hold the random states of a rank") from None
    return loaded


def check_info(loaded: CheckpointInfo, settings: Settings, world: int) -> None:
    """Raises CheckpointError, SettingError if these settings cannot continue a run's checkpoint."""
    found = {"model": {}, "levels": {}} | loaded.extra  # checkpoints of before have neither
    for name, kind in (("bins_a_step", int), ("data", str), ("model", dict), ("levels", dict)):
        if type(found.get(name)) is not kind:
            raise damaged(loaded.path, EXTRA, f"does not hold {name} as a run writes it")
    if loaded.extra.get("mtp_num_layers") and not settings.model.mtp_num_layers:
        raise SettingError(
            f"{loaded.path} was trained with model.mtp_num_layers: 1, and without it what that layer learned would be lost;"
            f" set it again, or {START_ANEW}"
        )
    before, now = loaded.extra["bins_a_step"], sequences_per_step(settings, world)
    if before != now:
        raise SettingError(
            f"{loaded.path} was trained with {before} packed sequences per step (micro_batch_size x"
            f" gradient_accumulation_steps x processes), these settings make {now}: the data cannot go on where it stopped;"
            " keep the product the same"
        )


def check_extra(loaded: CheckpointInfo, extra: dict[str, Any], settings: Settings) -> None:
    """Raises SettingError if the run could not go on as if it had never stopped."""
    if loaded.extra.get("data") != extra["data"]:
        changed = [c for c in relevant(changes(loaded.path.parent, settings)) if c.startswith(DATA_ORDER)]
        why = "; ".join(changed) or "the records or the tokenizer have changed, or other records were skipped"
        raise SettingError(
            f"{loaded.path} was trained on other data, or in another order ({why}), and cannot go on where it stopped; undo"
            f" the change, or {START_ANEW}"
        )
    if changed := differences(loaded.extra.get("levels", {}), extra["levels"]):
        what = f"with other images or videos, or another normalization of pixels ({'; '.join(changed)})"
        raise SettingError(f"{loaded.path} was trained {what}; undo the change, or {START_ANEW}")


def sequences_per_step(settings: Settings, world: int | None = None) -> int:
    """Packed sequences of all ranks (default: as many as there are) in one optimizer step."""
    t, data_size = settings.training, (world or dist.get_world_size()) // settings.parallel.ulysses_parallel_size
    return t.micro_batch_size * t.gradient_accumulation_steps * data_size


def check_disk(t: TrainingSettings, parameters: Iterable[Tensor], step: int) -> str:
    """What the checkpoints after `step` take on the disk of the save folder, which may not exist.

    A checkpoint holds `parameters` and, of those that are trained, AdamW's two moments, in fp32.
    With save_total_limit there is one more while the oldest waits for the new one to be complete.
    Raises CheckpointError if they do not fit, or if the folder cannot be written.
    """
    folder = Path(t.save).absolute()
    size = sum(p.numel() * (12 if p.requires_grad else 4) for p in parameters)
    interval = t.save_interval or t.train_iters
    saves = t.train_iters // interval - step // interval + (t.train_iters % interval > 0)
    saves *= step < t.train_iters
    if t.save_total_limit is not None:
        kept = sum(ITERATION.fullmatch(path.name) is not None for path in folder.glob("iter_*"))
        saves = min(saves, max(1, t.save_total_limit + 1 - kept))
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "cannot be written by this user" if existing.is_dir() else "is not a folder"
        raise CheckpointError(f"training.save: {t.save}: {existing} {why}; name another folder")
    free = shutil.disk_usage(existing).free
    room = f"{number_of(saves, 'checkpoint')} of {size:,} bytes, and {free:,} are free on that disk"
    if free < saves * size:
        raise CheckpointError(
            f"training.save: {t.save}: this run needs {saves * size:,} bytes for {room}; free some space, name another"
            " folder, or keep fewer (training.save_total_limit, training.save_interval)"
        )
    return room


def changes(folder: Path, settings: Settings) -> list[str]:
    """The settings that differ from those with which the run in `folder` started last."""
    recipe = folder / "config.yaml"
    return difference(load_settings(recipe), settings) if recipe.is_file() else []


def relevant(changed: list[str]) -> list[str]:
    """Those of `changes` that change what is trained."""
    return [change for change in changed if not change.startswith(WITHOUT_EFFECT)]


def check_finished(folder: Path, step: int, changed: list[str], settings: Settings) -> None:
    """Raises SettingError unless the folder holds the finished run of these settings.

    Without a checkpoint it does not: training.load has done all the steps elsewhere.
    """
    if newest_checkpoint(folder) is None:
        raise SettingError(
            f"training.load: {settings.training.load} has done {step} steps, and training.train_iters is "
            f"{settings.training.train_iters}; raise it to go on from there, or {START_ANEW}"
        )
    if changed := relevant(changed):
        raise SettingError(
            f"{folder} holds {step} steps of other settings ({'; '.join(changed)}); name another training.save, or go on"
            " with a larger training.train_iters"
        )


def finish(settings: Settings, folder: Path, step: int) -> int:
    """For a run that has done all its steps; returns the exit code 0.

    Rank 0 does what a run that was killed as it ended left: older checkpoints, the page.
    """
    check_finished(folder, step, changes(folder, settings) if step else [], settings)
    logger.info(f"{folder} has done all its {step} steps: nothing left to train")
    if dist.get_rank() == 0:
        if (limit := settings.training.save_total_limit) is not None:
            keep_newest(folder, limit)
        if (folder / "metrics.jsonl").exists():
            write_report(folder)
    return 0


# -- random states ---------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    """Seed every generator of this process, its device's too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # libraries draw from numpy's global generator
    torch.manual_seed(seed)


def rng_states(device: torch.device) -> dict[str, Any]:
    """This rank's states, of types that a checkpoint's extra data may hold."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "device": device_rng_state(device),
    }


def restore_rng(states: dict[str, Any], device: torch.device) -> None:
    """The inverse of `rng_states`. Raises BROKEN_STATES."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        set_device_rng_state(states["device"], device)
