"""What must not have changed when a run goes on from a checkpoint, and the random states."""

import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwen35.checkpoint import dcp_folder
from qwen35.checkpoint.dcp import EXTRA, RANK_EXTRA, CheckpointInfo
from qwen35.checkpoint.dcp_folder import ITERATION, damaged, keep_newest, newest_checkpoint
from qwen35.checkpoint.dcp_write import run_sharing_errors
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.folders import remove_leftovers
from qwen35.checkpoint.hf_names import saved_parameters
from qwen35.config.load import LENGTHS, SettingError, difference, load_settings
from qwen35.config.schema import Settings, TrainingSettings
from qwen35.data import MicroBatches
from qwen35.device import device_rng_state, set_device_rng_state
from qwen35.log import log_warnings, logger
from qwen35.model.config import ModelConfig, differences
from qwen35.training.metrics import RunError
from qwen35.training.report import write_report
from qwen35.wording import number_of

# these decide what each packed sequence holds
DATA_ORDER = ("data.", "model.model_name_or_path", "training.seed", "training.stage")
WITHOUT_EFFECT = (  # settings that do not change what is trained
    "training.log_interval", "training.save_interval", "training.save_total_limit", "training.async_save",
    "training.save_best", "training.early_stopping_patience", "training.report_to",
    "training.peak_tflops", "training.zero_grad_patience", "training.timeout", "training.max_restarts",
    "training.profile.", "training.val_", "data.val_dataset_param",
    "data.dataloader_param.num_workers", "data.dataset_param.basic_parameters.cache_dir",
)  # fmt: skip
UNFILLED = "unfilled_steps"  # in extra.json: the first epoch's steps without empty packed sequences
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
        aside = next(p for n in count() if not (p := path.with_name(f"{path.name}.damaged{n or ''}")).exists())
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


def make_extra(settings: Settings, config: ModelConfig, data: MicroBatches, world: int | None = None) -> dict[str, Any]:
    """The contents of a checkpoint's extra.json: what must not change for the run to go on.

    As long as the number of packed sequences per step stays the same, a step trains on the same
    ones, however they are split over ranks and micro-steps. Where epochs end with a step, only the
    first steps are those of a run by train_iters: so many.
    """
    per_step = sequences_per_step(settings, world)
    extra = {
        "bins_a_step": per_step,
        "data": data.fingerprint,
        "model": asdict(config),
        "levels": dict(data.normalization),
        "mtp_num_layers": settings.model.mtp_num_layers,
    }
    return extra | ({UNFILLED: data.sequences_per_epoch // per_step} if settings.training.train_epochs else {})


def check_place(loaded: CheckpointInfo, settings: Settings, device: torch.device) -> None:
    """What a run's checkpoint holds besides tensors, checked before the data is read.

    Raises CheckpointError if it is damaged, SettingError if these settings cannot continue it.
    """
    check_info(loaded, settings, dist.get_world_size())
    if loaded.world_size == dist.get_world_size():
        rank_file = RANK_EXTRA.format(dist.get_rank())
        if loaded.rank_extra is None:
            raise damaged(loaded.path, rank_file, "is missing: the random states of this rank")
        try:
            restore_rng(loaded.rank_extra, device)  # only a check: setup restores them after the last draw
        except BROKEN_STATES:
            raise damaged(loaded.path, rank_file, "does not hold the random states of a rank") from None


def check_info(loaded: CheckpointInfo, settings: Settings, world: int) -> None:
    """Raises CheckpointError, SettingError if these settings cannot continue a run's checkpoint."""
    found = {"model": {}, "levels": {}, UNFILLED: 0} | loaded.extra  # checkpoints of before have none of these
    for name, kind in (("bins_a_step", int), ("data", str), ("model", dict), ("levels", dict), (UNFILLED, int)):
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
    before, now = loaded.extra.get(UNFILLED), extra.get(UNFILLED)
    filled = (now or 0) if before is None else before
    if (before is None) != (now is None) and (loaded.step or 0) > filled:
        old, new = LENGTHS if now is None else LENGTHS[::-1]
        raise SettingError(
            f"{loaded.path} was trained by {old}, and after its first epoch the steps of {new} hold other packed sequences:"
            f" an epoch of train_epochs ends with a step; set {old}, or {START_ANEW}"
        )


def sequences_per_step(settings: Settings, world: int | None = None) -> int:
    """Packed sequences of all ranks (default: as many as there are) in one optimizer step."""
    t, data_size = settings.training, (world or dist.get_world_size()) // settings.parallel.ulysses_parallel_size
    return t.micro_batch_size * t.gradient_accumulation_steps * data_size


def check_disk(t: TrainingSettings, parameters: Iterable[Tensor], step: int, steps: int | None) -> str:
    """What the checkpoints after `step` take on the disk of the save folder, which may not exist.

    steps: those of the run; None: as many as the data make of train_epochs, with one checkpoint.
    A checkpoint holds `parameters` and, of those that are trained, AdamW's two moments, in fp32.
    With save_total_limit there is one more while the oldest waits for the new one to be complete,
    and with save_best the best. Each validation may be the best.
    Raises CheckpointError if they do not fit, or if the folder cannot be written.
    """
    folder = Path(t.save).absolute()
    size = sum(p.numel() * (12 if p.requires_grad else 4) for p in parameters)
    saves = len(save_steps(t, step, steps)) if steps else 1
    if t.save_total_limit is not None:
        kept = sum(ITERATION.fullmatch(path.name) is not None for path in folder.glob("iter_*"))
        saves = min(saves, max(1, t.save_total_limit + 1 + bool(t.save_best) - kept))
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "cannot be written by this user" if existing.is_dir() else "is not a folder"
        raise CheckpointError(f"training.save: {t.save}: {existing} {why}; name another folder")
    free = shutil.disk_usage(existing).free
    least = "" if steps else "at least "
    room = f"{least}{number_of(saves, 'checkpoint')} of {size:,} bytes, and {free:,} are free on that disk"
    if free < saves * size:
        raise CheckpointError(
            f"training.save: {t.save}: this run needs {saves * size:,} bytes for {room}; free some space, name another"
            " folder, or keep fewer (training.save_total_limit, training.save_interval)"
        )
    return room


def save_steps(t: TrainingSettings, step: int, steps: int) -> set[int]:
    """The steps after `step` at which a run may save, the last of its `steps` too."""
    intervals = (t.save_interval, t.save_best and t.val_interval)
    due = (range(step - step % every + every, steps, every) for every in intervals if every)
    return {*chain.from_iterable(due), *range(max(step + 1, steps), steps + 1)}


def check_room(settings: Settings, model: nn.Module, step: int, steps: int | None) -> str:
    """`check_disk` on rank 0, whose error all raise. The line that a run starts with there."""
    t, rooms = settings.training, []

    def check() -> None:
        if dist.get_rank() == 0:
            rooms.append(check_disk(t, saved_parameters(model).values(), step, steps))

    run_sharing_errors(check, None, t.save)
    return f"{t.save} takes {rooms[0]}" if rooms else ""


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
    t = settings.training
    length, value = (LENGTHS[0], t.train_epochs) if t.train_epochs else (LENGTHS[1], t.train_iters)
    if newest_checkpoint(folder) is None:
        raise SettingError(
            f"training.load: {t.load} has done {step} steps, and {length} is {value}; raise it to go on from there, or "
            f"{START_ANEW}"
        )
    if changed := relevant(changed):
        raise SettingError(
            f"{folder} holds {step} steps of other settings ({'; '.join(changed)}); name another training.save, or go on"
            f" with a larger {length}"
        )


def is_finished(settings: Settings, step: int, steps: int, changed: list[str]) -> bool:
    """Whether nothing is left to train. Raises SettingError if the save folder holds another run.

    changed: the settings that differ from those of the checkpoint.
    """
    if step < steps:
        if changed:
            log_warnings([f"settings changed since the checkpoint: {'; '.join(changed)}"])
        return False
    folder = Path(settings.training.save)
    check_finished(folder, step, changes(folder, settings) if step else [], settings)
    logger.info(f"{folder} has done all its {step} steps: nothing left to train")
    finish_ending(folder, settings.training.save_total_limit)
    return True


def finish_ending(folder: Path, limit: int | None) -> None:
    """On rank 0, what a run that was killed as it ended left to do: older checkpoints, the page."""
    if dist.get_rank() > 0:
        return
    if limit is not None:
        keep_newest(folder, limit)
    if (folder / "metrics.jsonl").exists():
        write_report(folder)


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
