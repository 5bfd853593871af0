"""The recipe and what it names: the run's own checks, in their order and in their words."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qwen35.errors import USER_ERRORS, SettingError, one_line
from qwen35.tools.doctor.host import Finding, Machine, gib, note, ok, wrong

if TYPE_CHECKING:
    from qwen35.checkpoint.dcp import CheckpointInfo
    from qwen35.config.schema import Settings

SECONDS = 30.0  # for reading the records of a set
BATCHES = 3  # in flight for each worker of a data loader: two prefetched, one in use
NO_CACHE = "data.dataset_param.basic_parameters.cache_dir=null"  # nothing is written
TINY = "configs/tiny.yaml"
TINY_MAKES = ("ckpt/hf_path/tiny", "ckpt/mm_path/tiny", "data/digits/train.json")
TODO = {
    "recipe": "change the setting, or NODES and NPUS_PER_NODE",
    "kernels": "see python -m kernels",
    "model": "model_name_or_path is a whole Hugging Face folder of a Qwen3.5, as make download makes it",
    "weights": "make download fetches a model for init_from_hf_path, make convert makes the folder of training.load of it",
    "disk": "see training.save in docs/settings.md",
    "data": "correct the records or the settings; make show prints samples as the training sees them",
}


class _TimeIsUpError(Exception):
    """Reading takes too long; what was read until then is in order."""


def recipe(m: Machine, config: str, overrides: list[str]) -> list[Finding]:
    import kernels
    from qwen35.config.layout import check_layout
    from qwen35.config.load import load_settings
    from qwen35.device import HOST, enable_determinism

    try:
        s = load_settings(config, [*overrides, NO_CACHE])
    except SettingError as error:
        return [wrong("recipe", str(error), "CONFIG is the recipe, ARGS has settings that replace its own")]
    found, world = [ok("recipe", config)], m.number("NODES", 1) * m.processes()
    with checking(found, "recipe"):
        check_layout(s, world)
        if s.training.deterministic:
            enable_determinism()
    with checking(found, "kernels"):
        kernels.select(m.accelerator or HOST.type, s.model.kernels)
    named = {s.model.model_name_or_path, s.training.load, s.data.dataset_param.basic_parameters.dataset} - {None}
    missing = [name for name in TINY_MAKES if name in named and not (m.root / name).exists()]
    if missing and named <= set(TINY_MAKES) and Path(config).absolute() == (m.root / TINY).absolute():
        return [*found, note("recipe", f"not made yet: {', '.join(missing)}", "make finetune makes them first")]
    checked = SimpleNamespace(config=None, loaded=None)
    with checking(found, "model"):
        model(m, s, found, checked, world)
    return [*found, *records(s, checked.config, checked.loaded, world)] if checked.config else found


@contextmanager
def checking(found: list[Finding], subject: str) -> Iterator[None]:
    """Add the error of the block to the findings."""
    from kernels import KernelError

    try:
        yield
    except (*USER_ERRORS, KernelError) as error:
        found.append(wrong(subject, one_line(error), TODO["data" if subject == "validation" else subject]))


def model(m: Machine, s: "Settings", found: list[Finding], checked: SimpleNamespace, world: int) -> None:
    """The model, the weights it starts from, and the space that batches and checkpoints need."""
    import torch

    from qwen35.checkpoint.dcp import open_matching_checkpoint, read_info
    from qwen35.checkpoint.dcp_folder import find_newest, load_notes
    from qwen35.checkpoint.hf import check_export, not_read, open_matching_folder
    from qwen35.checkpoint.lock import LOCK, holding
    from qwen35.model import Qwen35, load_config
    from qwen35.training.parameter_groups import count, freeze
    from qwen35.training.resume import check_disk, check_info, choose_weights

    folder, save, t = s.model.model_name_or_path, Path(s.training.save), s.training
    unread = not_read(folder)
    config = load_config(folder)
    with torch.device("meta"):
        whole = Qwen35(config, mtp=bool(s.model.mtp_num_layers))
    freeze(whole, s.model.freeze)
    check_export(whole, folder)
    checked.config = config  # with which the data can be read
    trained, frozen = (count(whole.parameters(), kind) for kind in (True, False))
    found.append(ok("model", f"{folder}: {trained + frozen:,} parameters, {trained:,} trained"))
    step = 0
    with checking(found, "weights"):
        find_newest(save)
        path, is_hf = choose_weights(s)
        open_matching_folder(whole, path) if is_hf else open_matching_checkpoint(whole, path)
        unread += not_read(path) if is_hf and path != Path(folder) else []
        if not is_hf and (loaded := read_info(path)).step:
            check_info(loaded, s, world)
            checked.loaded, step = loaded, loaded.step
        found.append(ok("weights", "; ".join([f"from {path}", *load_notes(path.parent, path)])))
    found += [note("model", line, "ignore this if training does not need it") for line in unread]
    with checking(found, "disk"):
        if (save / LOCK).exists():
            with holding(save):  # no other job does
                pass
        found.append(ok("disk", f"{save}: {check_disk(t, whole.parameters(), step)}"))
    vision, loader = config.vision, s.data.dataloader_param
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * 4  # bytes in fp32
    patches = s.data.dataset_param.basic_parameters.cutoff_len * t.micro_batch_size * vision.spatial_merge_size**2
    if batches := m.processes() * loader.num_workers * BATCHES:
        found.append(shared_memory(m, batches * loader.patch_bucket * patch, batches * patches * patch))


def shared_memory(m: Machine, least: int, most: int) -> Finding:
    """Loaders pass batches through /dev/shm: `least` bytes, `most` if full of images."""
    todo = "start the container with a larger --shm-size, or set data.dataloader_param.num_workers=0"
    try:
        stat = os.statvfs(m.files / "dev/shm")
    except OSError as error:
        return wrong("/dev/shm", str(error.strerror), todo)
    free = stat.f_bavail * stat.f_frsize
    if free < least:
        return wrong("/dev/shm", f"{gib(free)} free, the data loaders need {gib(least)}", todo)
    if free < most:
        return note("/dev/shm", f"{gib(free)} free, enough unless batches are full of images ({gib(most)})", todo)
    return ok("/dev/shm", f"{gib(free)} free, the data loaders need {gib(most)} at most")


def records(s: "Settings", config: Any = None, loaded: "CheckpointInfo | None" = None, world: int = 1) -> list[Finding]:
    """All records of both sets, read as the run does, each set for at most SECONDS.

    loaded: a checkpoint of a run, which must have been trained on the same data.
    """
    from qwen35.data import MicroBatches
    from qwen35.device import HOST
    from qwen35.training.resume import changes, check_extra, check_finished, make_extra
    from qwen35.training.validation import Validation

    found: list[Finding] = []
    with reading(found, "data") as progress:
        batches = MicroBatches(s, 0, 1, progress=progress)
        if loaded:
            extra = make_extra(s, config, batches.fingerprint, batches.normalization, world)
            check_extra(loaded, extra, s)
            if (loaded.step or 0) >= s.training.train_iters:
                check_finished(Path(s.training.save), loaded.step or 0, changes(loaded.path.parent, s), s)
        first, *others = batches.report().splitlines()
        found.append(ok("data", first.removeprefix("data: ")))
        found += [note("data", line.removeprefix("data: ")) for line in (*others, *batches.size_warnings)]
    if val := s.validation:
        with reading(found, "validation") as progress:
            alone: Any = SimpleNamespace(data_rank=0, data_size=1)  # all that is read of the meshes here
            validation = Validation(val, alone, HOST, None, progress, s.data.dataset_param)  # type: ignore[arg-type]
            found.append(ok("validation", validation.report().partition(": ")[2]))
    return found


@contextmanager
def reading(found: list[Finding], subject: str) -> "Iterator[Any]":
    """As `checking`, with what a set calls for each record. Without more time it is a note."""
    count, end = 0, time.monotonic() + SECONDS

    def progress(record: str, records: int) -> None:
        nonlocal count
        count += records
        if time.monotonic() > end:
            raise _TimeIsUpError

    with checking(found, subject):
        try:
            yield progress
        except _TimeIsUpError:
            fact = f"no fault in the first {count:,} records, which took {SECONDS:.0f} s"
            todo = "the run reads them all, compares the lengths of all with cutoff_len, and a resume's with its checkpoint"
            found.append(note(subject, fact, todo))
