"""The recipe and what it names, by the run's own checks and in the run's own words."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.errors import USER_ERRORS, one_line
from qwen35.tools.doctor.host import Finding, Machine, disk, gib, note, ok, wrong

if TYPE_CHECKING:
    from qwen35.config.schema import Settings
    from qwen35.data.dataset import Dataset
    from qwen35.data.tokenized import Progress

SECONDS = 30.0  # for reading the records of a set
BATCHES = 3  # in flight for each worker of a data loader: two prefetched, one in use
NO_CACHE = "data.dataset_param.basic_parameters.cache_dir=null"  # nothing is written
TINY = "configs/tiny.yaml"
TINY_MAKES = ("ckpt/hf_path/tiny", "ckpt/mm_path/tiny", "data/digits/train.json")
WHOLE_FOLDER = "model_name_or_path is a whole Hugging Face folder of a Qwen3.5, as make download makes it"


class _TimeIsUpError(Exception):
    """Reading takes too long; what was read until then is in order."""


def attempt(subject: str, todo: str, check: Callable[[], object]) -> list[Finding]:
    """The findings of a check, if it has any, or its error."""
    from kernels import KernelError

    try:
        findings = check()
        return findings if isinstance(findings, list) else []
    except (*USER_ERRORS, KernelError) as error:
        return [wrong(subject, one_line(error), todo)]


def recipe(m: Machine, config: str, overrides: list[str]) -> list[Finding]:
    import kernels
    from qwen35.config.layout import check_layout
    from qwen35.config.load import SettingError, load_settings
    from qwen35.device import HOST

    try:
        s = load_settings(config, [*overrides, NO_CACHE])
    except SettingError as error:
        return [wrong("recipe", str(error), "CONFIG is the recipe, ARGS has settings that replace its own")]

    findings, world = [ok("recipe", config)], m.number("NODES", 1) * m.processes()
    findings += attempt("recipe", "change the setting, or NODES and NPUS_PER_NODE", lambda: check_layout(s, world))
    device = m.accelerator or HOST.type
    findings += attempt("kernels", "see python -m kernels", lambda: kernels.select(device, s.model.kernels))
    named = {s.model.model_name_or_path, s.training.load, s.data.dataset_param.basic_parameters.dataset} - {None}
    missing = [name for name in TINY_MAKES if name in named and not (m.root / name).exists()]
    if missing and named <= set(TINY_MAKES) and Path(config).absolute() == (m.root / TINY).absolute():
        return [*findings, note("recipe", f"not made yet: {', '.join(missing)}", "make finetune makes them first")]
    found = attempt("model", WHOLE_FOLDER, lambda: model(m, s))
    can_read = (found[0].subject, found[0].status) != ("model", "wrong")  # with its tokenizer
    return [*findings, *found, *(records(s) if can_read else [])]


def model(m: Machine, s: "Settings") -> list[Finding]:
    """The model, the weights it starts from, and the space that batches and checkpoints need."""
    import torch

    from qwen35.checkpoint.dcp import open_matching_checkpoint, read_info
    from qwen35.checkpoint.dcp_folder import load_notes
    from qwen35.checkpoint.hf import check_export, not_read, open_matching_folder
    from qwen35.model import Qwen35, load_config
    from qwen35.training.parameter_groups import count, freeze
    from qwen35.training.resume import check_disk, check_info, choose_weights

    folder, t = s.model.model_name_or_path, s.training
    unread = [note("model", line, "ignore this if training does not need it") for line in not_read(folder)]
    config = load_config(folder)
    with torch.device("meta"):
        whole = Qwen35(config, mtp=bool(s.model.mtp_num_layers))
    freeze(whole, s.model.freeze)
    check_export(whole, folder)
    trained, frozen = (count(whole.parameters(), kind) for kind in (True, False))
    findings = [ok("model", f"{folder}: {trained + frozen:,} parameters, {trained:,} trained"), *unread]

    def weights() -> list[Finding]:
        path, is_hf = choose_weights(s)
        open_matching_folder(whole, path) if is_hf else open_matching_checkpoint(whole, path)
        step = 0
        if not is_hf and (loaded := read_info(path)).step:
            check_info(loaded, s, m.number("NODES", 1) * m.processes())
            step = loaded.step
        fine, room = ok("weights", "; ".join([f"from {path}", *load_notes(path.parent, path)])), Path(t.save)
        folder = disk("disk", room)
        if folder.status == "wrong":
            return [fine, folder]
        parameters = whole.parameters()
        return [
            fine,
            *attempt(
                "disk",
                "see training.save in docs/settings.md",
                lambda: [ok("disk", f"{room}: {check_disk(t, parameters, step)}")],
            ),
        ]

    todo = "make download fetches a model for init_from_hf_path, make convert makes the folder of training.load of it"
    findings += attempt("weights", todo, weights)
    vision, loader = config.vision, s.data.dataloader_param
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * 4  # bytes in fp32
    patches = s.data.dataset_param.basic_parameters.cutoff_len * t.micro_batch_size * vision.spatial_merge_size**2
    if batches := m.processes() * loader.num_workers * BATCHES:
        findings.append(shared_memory(m, batches * loader.patch_bucket * patch, batches * patches * patch))
    return findings


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


def records(s: "Settings") -> list[Finding]:
    """All records of both sets, read as the run does, each set for at most SECONDS."""
    from qwen35.config.schema import for_validation
    from qwen35.data import MicroBatches
    from qwen35.data.dataloader import open_dataset
    from qwen35.data.mixture import dataset_name

    named = dataset_name(s.data.dataset_param.basic_parameters.dataset)
    findings = read("data", named, lambda progress: MicroBatches(s, 0, 1, progress=progress).dataset)
    if val := s.validation:
        named, attr = dataset_name(val.data.dataset_param.basic_parameters.dataset), s.data.dataset_param.attr
        found = read("validation", named, lambda progress: open_dataset(val, progress, attr))
        findings += [Finding(f.status, f.subject, for_validation(f.fact), for_validation(f.todo)) for f in found]
    return findings


def read(subject: str, named: str, open_set: "Callable[[Progress], Dataset]") -> list[Finding]:
    count, end = 0, time.monotonic() + SECONDS

    def progress(record: str, records: int) -> None:
        nonlocal count
        count += records
        if time.monotonic() > end:
            raise _TimeIsUpError

    def check() -> list[Finding]:
        try:
            found = open_set(progress)
        except _TimeIsUpError:
            fact = f"{named}: no fault in the first {count:,} records, which took {SECONDS:.0f} s"
            return [note(subject, fact, "the run reads them all, and compares the lengths of all with cutoff_len")]
        fact = f"{named}: {found.records:,} records, of which {len(found):,} are used"
        skipped = f"{len(found.skipped):,} are skipped: {found.skipped}"
        notes = [note(subject, f"{named}: {skipped}", "on_bad_record: error would stop there")] * bool(found.skipped)
        return [ok(subject, fact), *notes, *(note(subject, line) for line in found.warnings)]

    return attempt(
        subject, "correct the records or the settings; make show prints samples as the training sees them", check
    )
